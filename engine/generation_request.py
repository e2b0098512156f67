"""One request for text: what is asked for, what has come so far, and the stream its caller reads."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from engine.config import EngineConfig
from engine.generation_driver import PAGE_TOKENS, Job
from engine.generation_model import Prompt
from engine.generation_text import Detokenizer, Stops
from engine.lane import Priority
from engine.tokens import check
from sluice.errors import Permanent, SluiceError

STOPS_MAX: Final = 16
STOP_CHARACTERS_MAX: Final = 256
TEMPERATURE_MAX: Final = 10.0
# Logits are divided by it: below, they overflow, and on a GPU what is no number kills the context.
TEMPERATURE_MIN: Final = 0.01

Finish = Literal["", "end", "length", "stop"]


@dataclass(slots=True)
class Usage:
    """What a request has used so far.

    Attributes:
        prompt_tokens: with special tokens and, in image-text models, those of the images.
        new_tokens: generated.
        finish: why the text ended: the model ended it (`end`), at the limit (`length`), at a stop text (`stop`); empty
            while it has not, or when it failed.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    finish: Finish = ""


class Answer:
    """The text of one request, piece by piece: an asynchronous iterator of non-empty strings.

    Attributes:
        usage: so far; complete when the iteration has ended.
    """

    def __init__(self, pieces: AsyncGenerator[str, None], usage: Usage) -> None:
        self._pieces = pieces
        self.usage = usage

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> str:
        """The next piece. Raises as `generation` says."""
        return await self._pieces.__anext__()

    async def aclose(self) -> None:
        """Ends the request, wherever it is. Idempotent."""
        await self._pieces.aclose()


@dataclass(frozen=True, slots=True)
class Ask:
    """What a caller asks for; see `Generator.generate`."""

    prompt: str
    images: tuple[bytes, ...] = ()
    chat: bool = False
    max_new_tokens: int | None = None
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    priority: Priority = Priority.BACKGROUND
    deadline_s: float | None = None

    def check(self, config: EngineConfig) -> None:
        """Raises Permanent when it can never be answered, naming the limit."""
        _, error = check(self.prompt, config.text_bytes_max)
        if error:
            raise Permanent(f"prompt: {error}")
        wanted, most = self.max_new_tokens, config.generation.new_tokens_max
        if wanted is not None and not 1 <= wanted <= most:
            raise Permanent(f"max_new_tokens {wanted} is not in 1 to {most} (engine.generation.new_tokens_max)")
        if self.temperature != 0 and not TEMPERATURE_MIN <= self.temperature <= TEMPERATURE_MAX:
            raise Permanent(
                f"temperature {self.temperature} is neither 0 nor in {TEMPERATURE_MIN} to {TEMPERATURE_MAX}"
            )
        if len(self.stop) > STOPS_MAX or not all(0 < len(each) <= STOP_CHARACTERS_MAX for each in self.stop):
            raise Permanent(f"stop: at most {STOPS_MAX} texts, each of 1 to {STOP_CHARACTERS_MAX} characters")


@dataclass(slots=True, eq=False)
class Request:
    """A request that waits or is under way.

    Attributes:
        number: unique.
        ask: what its caller asked for.
        prompt: in tokens.
        new_tokens: at most.
        usage: so far.
        detokenizer: of its new tokens.
        stops: where its text ends.
        asked_s: when it came, on the loop's clock, as all times here.
        started_s: when the driver got it.
        first_s: when its first tokens came.
        first_tokens: how many those were.
        last_s: when its last tokens came.
        error: why it failed.
        ended: whether no more comes.
        news: set when there are pieces, or it has ended.
        expiry: what ends it at its deadline.
    """

    number: int
    ask: Ask
    prompt: Prompt
    new_tokens: int
    usage: Usage
    detokenizer: Detokenizer
    stops: Stops
    asked_s: float
    started_s: float = 0.0
    first_s: float = 0.0
    first_tokens: int = 0
    last_s: float = 0.0
    error: SluiceError | None = None
    ended: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)
    expiry: asyncio.TimerHandle | None = None
    _pieces: list[str] = field(default_factory=list)

    @property
    def job(self) -> Job:
        """As a driver takes it."""
        return Job(self.job_id, self.prompt, self.new_tokens, self.ask.temperature)

    @property
    def job_id(self) -> str:
        """Its name with the driver."""
        return f"request-{self.number}"

    @property
    def cost(self) -> int:
        """Tokens that it may come to hold in the key-value cache, in whole pages."""
        return -(-(len(self.prompt.ids) + self.new_tokens) // PAGE_TOKENS) * PAGE_TOKENS

    def add(self, ids: Sequence[int]) -> int:
        """Takes all new tokens so far; returns how many are news. What comes behind a stop text is not its answer."""
        before = self.usage.new_tokens
        for token in ids[before:]:
            if self.stops.reached:
                break
            self.usage.new_tokens += 1
            self._give(self.stops.push(self.detokenizer.push(token)))
        return self.usage.new_tokens - before

    def end(self, error: SluiceError | None, finish: Finish) -> None:
        """No more comes: gives out what was held back, unless it failed."""
        if error is None:
            self._give(self.stops.push(self.detokenizer.flush()))
            self._give(self.stops.flush())
        self.ended, self.error, self.usage.finish = True, error, "stop" if self.stops.reached else finish
        self.news.set()
        if self.expiry is not None:
            self.expiry.cancel()

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The text, until it has ended; raises what it failed with, behind the text that came before."""
        while True:
            await self.news.wait()
            self.news.clear()
            ended, text = self.ended, "".join(self._pieces)
            self._pieces.clear()
            if text:
                yield text
            if ended:
                break
        if self.error is not None:
            raise self.error

    def _give(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self.news.set()
