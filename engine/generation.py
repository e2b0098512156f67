r"""Text generation: prompts in, pieces of text out as they are made. The task `generate`, with a door of its own.

```python
generator = Generator(config)
await generator.start()
async for piece in generator.generate("The disk is full because", max_new_tokens=64, stop=["\n"]):
    print(piece, end="")
await generator.close()
```

One generative model; how it is driven (continuous batching, or one request after another) says `generation_choice`,
and `plan` why. Image-text models, such as zai-org/AutoGLM-Phone-9B, take `images` beside the prompt; they need Pillow
and, most of them, torchvision (the extra `vision`).

Bounded: requests waiting or under way (`requests_max`), requests generated at a time, tokens under way (each request
counts with its prompt and everything it may still say, so that the key-value cache cannot overflow), prompt, answer,
and images. What waits is taken by due time: an online request is due at once, a background one after
`background_wait_s`, so the first goes before and the second does not starve. The text that a slow caller has not taken
yet is bounded by its own `max_new_tokens`.

Fails: the answer raises, for that request alone, Backpressure (full; nothing was kept), Permanent (a bad prompt, image
or parameter), `DeadlinePassed`, or Retryable (the device failed, or the generator closes). A caller that stops reading
(`aclose`, cancellation, an answer that is dropped) frees its place at once. Text that came before an error is part of
the answer, not all of it.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from typing import Final, TypeVar

from engine.config import EngineConfig
from engine.failures import DeadlinePassed
from engine.generation_choice import choose
from engine.generation_driver import Driver, Tokens
from engine.generation_model import Generative, Prompt, load_generative
from engine.generation_request import Answer, Ask, Finish, Request, Usage
from engine.generation_stats import GenerationMeter, GenerationStats, Outcome
from engine.generation_text import Detokenizer, Stops
from engine.lane import Item, Lane, Priority
from sluice.errors import Backpressure, Retryable, SluiceError

__all__ = ["Answer", "GenerationStats", "Generator", "Usage"]

# Bounds of back-pressure's delay, and what a request is assumed to take before the first one has ended, in seconds.
_RETRY_S: Final = (0.05, 30.0)
_REQUEST_S: Final = 2.0
# Weight of the newest request in the mean of their durations.
_NEWEST: Final = 0.1

_NOT_STARTED: Final = "the generator is not started"

_T = TypeVar("_T")


class Generator:
    """See the module's docstring. All methods are called on one event loop.

    Args:
        config: the engine's section; `generation.model` names the model, or `model` when that is empty.
        load: opens the model, on a thread of its own.
        meter: counts; one of its own when None.
    """

    def __init__(
        self,
        config: EngineConfig,
        load: Callable[[EngineConfig], Generative] = load_generative,
        meter: GenerationMeter | None = None,
    ) -> None:
        self.refusing = _NOT_STARTED
        self._config = config
        self._limits = config.generation
        self._load = load
        self._meter = meter or GenerationMeter()
        self._host = ThreadPoolExecutor(1, thread_name_prefix="engine-generate-host")
        self._model: Generative | None = None
        self._driver: Driver | None = None
        self._reviving: asyncio.Task[None] | None = None
        self._numbers = itertools.count()
        self._places = 0  # taken by requests, from their first moment to their last
        self._idle = asyncio.Event()
        self._idle.set()
        self._requests: dict[int, Request] = {}  # waiting and running
        self._waiting = Lane()
        self._running: dict[str, Request] = {}
        self._tokens_running = 0
        self._request_s = _REQUEST_S
        self._closed = False

    @property
    def model(self) -> str:
        """The model, as configured."""
        return self._limits.model or self._config.model

    @property
    def model_version(self) -> str:
        """Of its content; empty before `start`."""
        return self._model.card.version if self._model else ""

    @property
    def ready(self) -> bool:
        """Whether `generate` can be called."""
        return not self.refusing

    @property
    def sees(self) -> bool:
        """Whether it takes images."""
        return self._model is not None and self._model.processor is not None

    def plan(self) -> dict[str, str]:
        """What was chosen at start-up, each with its reason."""
        return dict(self._model.reasons) if self._model else {}

    def stats(self) -> GenerationStats:
        """Figures since the start."""
        return self._meter.stats(self)

    def levels(self) -> tuple[int, int, int]:
        """Requests waiting, requests running, and the tokens that those may come to hold."""
        return len(self._waiting), len(self._running), self._tokens_running

    async def start(self) -> None:
        """Loads the model and chooses how to drive it; ready afterwards.

        Raises:
            Permanent: the model is not there, damaged, or generates no text.
            ConfigError: the device is not there.
        """
        assert self._model is None, "start is called once"
        self._loop = asyncio.get_running_loop()
        self._model = await self._on_host(self._load, self._config)
        self._driver = await self._on_host(choose, self._model, self._post)
        if self.refusing == _NOT_STARTED:
            self.refusing = ""
            self._meter.watch(self)

    def generate(
        self,
        prompt: str,
        *,
        images: Sequence[bytes] = (),
        chat: bool = False,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        priority: Priority = Priority.BACKGROUND,
        deadline_s: float | None = None,
    ) -> Answer:
        """Continues a prompt. Nothing happens, and nothing is raised, before the first piece is asked for.

        Args:
            prompt: any text; with `chat` or images a user's message, for models with a chat template.
            images: PNG, JPEG, WebP, BMP or GIF files, for image-text models.
            chat: put the prompt into the model's chat template.
            max_new_tokens: at most `engine.generation.new_tokens_max`; fewer when the model cannot see more.
            temperature: 0 for the most likely token each time, else sampling as the model's folder configures it.
            stop: texts in front of which the answer ends.
            priority: ONLINE goes first.
            deadline_s: seconds from the first piece asked for until the whole text must be there.
        """
        ask = Ask(
            prompt,
            tuple(images),
            chat,
            max_new_tokens,
            temperature,
            tuple(stop),
            priority=priority,
            deadline_s=deadline_s,
        )
        usage = Usage()
        return Answer(self._pieces(ask, usage), usage)

    async def drain(self, deadline_s: float) -> None:
        """Refuses new requests, lets those there are end within `deadline_s` seconds, and closes."""
        self.refusing = self.refusing or "the generator is draining"
        with suppress(TimeoutError):  # what is left gets an error from close
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()
        await self.close()

    async def close(self) -> None:
        """Ends all requests with an error, and all threads. Idempotent, and allowed before `start`."""
        self._closed = True
        self.refusing = self.refusing or "the generator is closed"
        self._meter.forget(self)
        if self._reviving is not None:
            await asyncio.wait([self._reviving])
        for request in list(self._requests.values()):
            self._end(request, Retryable("the generator closes"))
        driver, self._driver = self._driver, None
        if driver is not None:
            await self._on_host(driver.close)
        await asyncio.to_thread(self._host.shutdown)  # it may still load a model
        self._idle.set()  # whoever drains it at the same time need not wait for callers that read nothing

    async def _pieces(self, ask: Ask, usage: Usage) -> AsyncGenerator[str, None]:
        """The body of an answer."""
        outcome: Outcome = "dropped"  # unless something else is seen
        try:
            async with aclosing(self._served(ask, usage)) as pieces:
                async for piece in pieces:
                    yield piece
            outcome = "finished"
        except Backpressure:
            outcome = "refused"
            raise
        except Exception:
            outcome = "failed"
            raise
        finally:
            self._meter.ended(outcome, ask.priority)

    async def _served(self, ask: Ask, usage: Usage) -> AsyncGenerator[str, None]:
        """A request from its first moment to its last."""
        if self.refusing:
            raise Retryable(self.refusing)
        ask.check(self._config)
        self._take_place()
        request = None
        try:
            request = await self._board(ask, usage, self._loop.time())
            async with aclosing(request.pieces()) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            if request is not None and not request.ended:
                self._drop(request)
            self._give_place()

    async def _board(self, ask: Ask, usage: Usage, asked_s: float) -> Request:
        """Reads the prompt and puts the request into the queue."""
        assert self._model is not None
        model = self._model
        until_s = None if ask.deadline_s is None else asked_s + ask.deadline_s
        try:
            async with asyncio.timeout_at(until_s):
                prompt: Prompt = await self._on_host(model.read, ask.prompt, ask.images, ask.chat)
        except TimeoutError as error:
            raise DeadlinePassed("its deadline passed before its prompt was read") from error
        if self._closed:  # and not while it drains: this request came before
            raise Retryable("the generator closes")
        room = model.context_tokens - len(prompt.ids)
        wanted = ask.max_new_tokens or min(self._limits.new_tokens_default, self._limits.new_tokens_max)
        usage.prompt_tokens = len(prompt.ids)
        request = Request(
            next(self._numbers),
            ask,
            prompt,
            min(wanted, room),
            usage,
            Detokenizer(model.decode),
            Stops(ask.stop),
            asked_s,
        )
        self._requests[request.number] = request
        if until_s is not None:
            request.expiry = self._loop.call_at(until_s, self._expire, request)
        now_s = self._loop.time()
        wait_s = 0.0 if ask.priority is Priority.ONLINE else self._limits.background_wait_s
        self._waiting.push(Item(request.number, request.cost, ask.priority, now_s), now_s + wait_s)
        self._dispatch()
        return request

    def _dispatch(self) -> None:
        """Starts what is due first, as far as there is room."""
        while (head := self._waiting.head()) is not None and self._driver is not None:
            fits = self._tokens_running + head[0].tokens <= self._limits.cache_tokens_max
            # A request larger than the cache's rounding has it to itself.
            if len(self._running) >= self._driver.slots or not (fits or not self._running):
                return
            if not self._driver.alive:
                self._reviving = self._reviving or asyncio.ensure_future(self._revive(self._driver))
                return
            request = self._requests[self._waiting.pop().id]
            request.started_s = self._loop.time()
            self._running[request.job_id] = request
            self._tokens_running += request.cost
            self._meter.read(len(request.prompt.ids))
            self._driver.submit(request.job)

    def _post(self, reports: list[Tokens]) -> None:
        """From a driver's thread to the event loop's."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._take, reports)

    def _take(self, reports: list[Tokens]) -> None:
        """New tokens have come."""
        ends = self._model.ends if self._model else []
        for report in reports:
            request = self._running.get(report.id)
            if request is None:
                continue
            self._count(request, request.add(report.ids))
            if report.error:
                self._end(request, Retryable(f"generation failed: {report.error}"))
            elif report.ended or request.stops.reached:
                self._end(request, None, "end" if report.ids and report.ids[-1] in ends else "length")
        self._dispatch()

    def _count(self, request: Request, news: int) -> None:
        """So many new tokens of a request have come."""
        if not news:
            return
        now_s = self._loop.time()
        self._meter.made(news)
        if request.usage.new_tokens == news:
            request.first_s = now_s
            request.first_tokens = news
            self._meter.first(now_s - request.asked_s, request.ask.priority)
        request.last_s = now_s

    def _expire(self, request: Request) -> None:
        self._end(request, DeadlinePassed("its deadline passed before its text was complete"))
        self._dispatch()

    def _end(self, request: Request, error: SluiceError | None, finish: Finish = "") -> None:
        """A request's last moment: its caller gets the rest, and its place with the driver is free."""
        if not request.ended:
            request.end(error, finish)
            if later := request.usage.new_tokens - request.first_tokens:
                self._meter.paced(request.last_s - request.first_s, later)
            self._release(request)

    def _drop(self, request: Request) -> None:
        """The caller went away."""
        request.end(Retryable("nobody waits for it"), "")
        self._release(request)
        self._dispatch()

    def _release(self, request: Request) -> None:
        del self._requests[request.number]
        if self._running.pop(request.job_id, None) is None:
            self._waiting.remove(request.number)
            return
        self._tokens_running -= request.cost
        self._request_s += _NEWEST * (self._loop.time() - request.started_s - self._request_s)
        if self._driver is not None:
            self._driver.cancel(request.job_id)  # nothing, when it has ended by itself

    def _take_place(self) -> None:
        if self._places >= self._limits.requests_max:
            slots = self._driver.slots if self._driver else 1
            low, high = _RETRY_S
            raise Backpressure(
                f"{self._places} requests wait or are under way (engine.generation.requests_max)",
                retry_after_s=min(high, max(low, self._request_s / slots)),
            )
        self._places += 1
        self._idle.clear()

    def _give_place(self) -> None:
        self._places -= 1
        if not self._places:
            self._idle.set()

    async def _revive(self, dead: Driver) -> None:
        """Opens a driver in place of one whose thread died; what waits stays, or gets the reason why it cannot."""
        self._driver = None
        try:
            await self._on_host(dead.close)
            # All that it had to say has come: only who is in none of its reports is left.
            for request in list(self._running.values()):
                self._end(request, Retryable("generation failed: its thread died"))
            self._driver = await self._on_host(choose, self._model, self._post)
        except Exception as error:  # noqa: BLE001 - whoever waits must be told, whatever it was
            self._driver = dead
            for request in list(self._requests.values()):
                self._end(request, Retryable(f"generation cannot be resumed: {error}"))
        self._reviving = None
        self._dispatch()

    async def _on_host(self, function: Callable[..., _T], *arguments: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._host, function, *arguments)
