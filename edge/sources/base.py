"""What every source has, and how a configuration becomes one."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from edge.config import GeneratorConfig, HostConfig, SourceConfig, StdinConfig, TailConfig
from edge.records import Chunk
from sluice.codec import Limits
from sluice.delivery import Delivery
from sluice.telemetry import Event, Telemetry

RECORD_REFUSED = Event(
    name="record_refused",
    unit="records",
    help="Records that break a limit and were not accepted.",
    labels=("source", "reason"),
    level="warning",
)


def utc_now_us() -> int:
    """This host's clock: UTC microseconds."""
    return time.time_ns() // 1000


@dataclass(frozen=True, slots=True)
class SourceContext:
    """What a source is given.

    Attributes:
        limits: that its records must keep.
        telemetry: for events.
        cursors: its places at the last commit, by name; the names begin with its identity.
        now_us: the clock for event times.
    """

    limits: Limits
    telemetry: Telemetry
    cursors: Mapping[str, bytes]
    now_us: Callable[[], int] = utc_now_us


class ChunkSource(Protocol):
    """A source of the agent."""

    @property
    def name(self) -> str:
        """Its identity, for logs."""
        ...

    def deliveries(self) -> AsyncGenerator[Delivery[Chunk], None]:
        """Chunks in order, each settled when durable; ends when exhausted or stopped."""
        ...

    def stop(self) -> None:
        """Ends `deliveries` soon. Call on the loop."""
        ...


class StopFlag:
    """Ends a source's waiting."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    @property
    def is_set(self) -> bool:
        """Whether the source must end."""
        return self._event.is_set()

    def set(self) -> None:
        """Ends it."""
        self._event.set()

    async def wait(self, timeout_s: float) -> bool:
        """Waits; returns True when the source must end."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            return False
        return True


def delivery(chunk: Chunk) -> Delivery[Chunk]:
    """A delivery whose source needs no answer: its cursors are stored with its records."""
    return Delivery(chunk, lambda _error: None)


def make_source(config: SourceConfig, context: SourceContext) -> ChunkSource:
    """The source that a section describes.

    Sources of other packages will register here, by entry point.
    """
    match config:
        case TailConfig():
            from edge.sources.tail import TailSource

            return TailSource(config, context)
        case HostConfig():
            from edge.sources.host import HostSource

            return HostSource(config, context)
        case StdinConfig():
            from edge.sources.stdin import StdinSource

            return StdinSource(config, context)
        case GeneratorConfig():
            from edge.sources.generator import GeneratorSource

            return GeneratorSource(config, context)
