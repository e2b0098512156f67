"""What drives a generative model: the interface that `generation` works through.

A driver reports through `on_tokens`, on a thread of its own: all new tokens of a job so far, then its end, with an
error or without. A cancelled job may report a little more; its slot is free for the next one at once (continuous
batching) or after the token under way (one by one).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from engine.generation_model import Prompt

# Tokens in a page of the key-value cache: a request's share is rounded up to it.
PAGE_TOKENS: Final = 32


@dataclass(frozen=True, slots=True)
class Job:
    """One request, as a driver takes it.

    Attributes:
        id: unique among what is under way.
        prompt: in tokens.
        new_tokens: at most.
        temperature: 0 for the most likely token each time.
    """

    id: str
    prompt: Prompt
    new_tokens: int
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a driver reports of a job: all its new tokens so far, whether it has ended, and why it failed if it did."""

    id: str
    ids: list[int] = field(default_factory=list)
    ended: bool = False
    error: str = ""


OnTokens = Callable[[list[Tokens]], None]


class Driver(Protocol):
    """See the module's docstring. Methods are called on one thread."""

    @property
    def slots(self) -> int:
        """Jobs that may be under way."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it can take jobs; a dead one has reported the end of all of them."""
        ...

    def submit(self, job: Job) -> None:
        """Starts a job."""
        ...

    def cancel(self, job_id: str) -> None:
        """Drops a job; unknown ones are ignored."""
        ...

    def close(self) -> None:
        """Ends its threads, waiting for the step under way. Idempotent."""
        ...
