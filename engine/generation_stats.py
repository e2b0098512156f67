"""Figures of text generation: counted once, shown twice (`Generator.stats()` and Prometheus).

One meter belongs to a Telemetry, since metric names are unique in a registry; the generators that follow each other in
an engine share it. It counts on the event loop's thread; the gauges are read on the thread that serves metrics.
"""

from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, Protocol

from engine.lane import Priority
from sluice.telemetry import Telemetry

# finished: with a text; failed: with an error; dropped: the caller went away; refused: there was no room.
Outcome = Literal["finished", "failed", "dropped", "refused"]

# From a short prompt on a GPU to a long one behind others on a CPU.
_FIRST_BUCKETS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_BUCKETS_S: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """Figures of a generator; counts since the start of the meter that it shares.

    Attributes:
        waiting: requests not begun.
        running: requests under way.
        tokens_running: tokens that those may hold in the key-value cache.
        finished: requests that ended with a text.
        failed: requests that ended with an error.
        dropped: requests whose caller went away.
        refused: requests that got back-pressure.
        prompt_tokens: of requests begun.
        new_tokens: generated.
    """

    waiting: int
    running: int
    tokens_running: int
    finished: int
    failed: int
    dropped: int
    refused: int
    prompt_tokens: int
    new_tokens: int


class Metered(Protocol):
    """What the gauges show; any thread may ask."""

    def levels(self) -> tuple[int, int, int]:
        """Requests waiting, requests running, tokens that those may hold."""
        ...


class GenerationMeter:
    """See the module's docstring.

    Args:
        telemetry: where the figures are metrics; None for nowhere.
    """

    def __init__(self, telemetry: Telemetry | None = None) -> None:
        telemetry = telemetry or Telemetry("engine")
        self.prompt_tokens = self.new_tokens = 0
        self._outcomes: dict[Outcome, int] = {"finished": 0, "failed": 0, "dropped": 0, "refused": 0}
        self._watched: tuple[Metered, ...] = ()
        self._requests = telemetry.counter("engine_generations", "Texts asked for.", ["outcome", "priority"])
        self._tokens = telemetry.counter("engine_generation_tokens", "Tokens of prompts, and generated.", ["kind"])
        self._first = telemetry.histogram(
            "engine_generation_first_token_seconds", "From request to first token.", _FIRST_BUCKETS_S, ["priority"]
        )
        self._pace = telemetry.histogram(
            "engine_generation_token_seconds", "Mean time per token of a text, after its first.", _TOKEN_BUCKETS_S
        )
        for priority in (each.name.lower() for each in Priority):
            self._first.labels(priority)
            for outcome in self._outcomes:
                self._requests.labels(outcome, priority)
        for kind in ("prompt", "new"):
            self._tokens.labels(kind)
        for level, (name, text) in enumerate(
            (
                ("engine_generations_waiting", "Texts not begun."),
                ("engine_generations_running", "Texts under way."),
                ("engine_generation_held_tokens", "Tokens that texts under way may come to hold."),
            )
        ):
            telemetry.gauge(name, text).set_function(partial(self._level, level))

    def watch(self, generator: Metered) -> None:
        """Adds it to what the gauges show."""
        self._watched = (*self._watched, generator)

    def forget(self, generator: Metered) -> None:
        """Takes it out again. Idempotent."""
        self._watched = tuple(each for each in self._watched if each is not generator)

    def ended(self, outcome: Outcome, priority: Priority) -> None:
        """A request has ended."""
        self._outcomes[outcome] += 1
        self._requests.labels(outcome, priority.name.lower()).inc()

    def read(self, tokens: int) -> None:
        """A request has begun, with a prompt of so many tokens."""
        self.prompt_tokens += tokens
        self._tokens.labels("prompt").inc(tokens)

    def made(self, tokens: int) -> None:
        """So many tokens were generated."""
        self.new_tokens += tokens
        self._tokens.labels("new").inc(tokens)

    def first(self, seconds: float, priority: Priority) -> None:
        """A request has its first token, so long after it came."""
        self._first.labels(priority.name.lower()).observe(seconds)

    def paced(self, seconds: float, tokens: int) -> None:
        """A request got so many tokens in so many seconds after its first one."""
        self._pace.observe(seconds / tokens)

    def _level(self, level: int) -> float:
        return sum(generator.levels()[level] for generator in self._watched)

    def stats(self, generator: Metered) -> GenerationStats:
        """All figures now, with the levels of one generator."""
        waiting, running, tokens_running = generator.levels()
        return GenerationStats(
            waiting,
            running,
            tokens_running,
            **self._outcomes,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
        )
