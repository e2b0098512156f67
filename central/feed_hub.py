"""The live end of the log: one reader for all partitions, a ring per partition, and whoever waits for news.

A thread reads Kafka; the rings are touched only on the event loop, and the next read starts when the last one is in the
rings, so a busy loop slows the reader instead of growing a queue.

Invariants:
  * `rings[p]` is complete from its `start_offset` on (see `central.ring`).
  * `epoch` changes when the log lost entries that positions may point at (a re-created topic); subscriptions of an
    older epoch must end, since their positions mean nothing any more.

Fails: a broker that is away is waited for, with back-off, and said once per outage.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from central.config import FeedConfig
from central.feed_batches import Entry
from central.feed_log import PROBE_FETCH_WAIT_MS, Bounds, LogReader, OffsetGone
from central.ring import Ring
from central.tokens import Partition
from sluice.backoff import Backoff
from sluice.connections import KafkaConfig
from sluice.errors import Retryable
from sluice.telemetry import Event, Telemetry

LOG_WAITING = Event(
    name="feed_log_waiting",
    unit="attempts",
    help="Attempts of the feed to reach Kafka that failed; it tries again.",
    level="warning",
)
LOG_TRUNCATED = Event(
    name="feed_log_truncated",
    unit="partitions",
    help="Partitions whose log ended before the feed's position: re-created, or lost by the broker.",
    labels=("topic",),
    level="error",
)
LOG_READY = Event(name="feed_log_ready", unit="partitions", help="Partitions that the feed follows.")

# What a ring holds of an entry beside its value, measured; a log of receipts or deletions is little else.
ENTRY_OVERHEAD_BYTES: Final = 512
READ_ENTRIES_MAX: Final = 256
READ_TIMEOUT_S: Final = 0.2
# What is read ahead of a probe or of one that catches up.
SMALL_QUEUE_BYTES: Final = 4 << 20
_T = TypeVar("_T")


class News:
    """Wakes all who wait, without remembering who they are."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def listen(self) -> asyncio.Event:
        """An event that is set at the next `tell`. Take it before looking, so that nothing falls between."""
        return self._event

    def tell(self) -> None:
        """Something changed."""
        event, self._event = self._event, asyncio.Event()
        event.set()


class FeedHub:
    """See the module's docstring.

    Args:
        kafka: how to reach it, and its topics.
        config: sizes of the rings.
        telemetry: for its events.
    """

    def __init__(self, kafka: KafkaConfig, config: FeedConfig, telemetry: Telemetry) -> None:
        self.rings: dict[Partition, Ring[Entry]] = {}
        self.news = News()
        self.epoch = 0
        self.ready = asyncio.Event()
        self.not_ready = asyncio.Event()
        self.not_ready.set()
        self.draining: str | None = None
        self.catch_up_permits = asyncio.Semaphore(config.catch_up_max)
        self._kafka = kafka
        self._config = config
        self._telemetry = telemetry
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="feed-reader")
        self._catch_up_executor = ThreadPoolExecutor(min(8, config.catch_up_max), thread_name_prefix="feed-catch-up")
        self._prober = _Prober(self._open_prober)
        self._outage = False

    async def run(self) -> None:
        """Follows the log until cancelled."""
        backoff = Backoff(0.25, 10.0)
        reader: LogReader | None = None
        try:
            while True:
                try:
                    if reader is None:
                        reader = await self._on_reader(self._open_reader)
                    await self._follow(reader, backoff)
                except OffsetGone as gone:
                    self._telemetry.emit(LOG_TRUNCATED, topic=gone.partition[0], detail=str(gone))
                    self._set_ready(ready=False)
                    self.epoch += 1
                    self.news.tell()
                except Retryable as error:
                    self._waiting(str(error))
                    await asyncio.sleep(backoff.next_s())
        finally:
            await self._close(reader)

    async def bounds(self) -> Mapping[Partition, Bounds]:
        """What every partition holds, exactly, at a moment after the call."""
        return await self._prober.bounds(list(self.rings))

    async def offsets_at(self, partitions: Iterable[Partition], time_us: int) -> Mapping[Partition, int]:
        """See `LogReader.offsets_at`."""
        wanted = list(partitions)
        return await self._prober.ask(lambda prober: prober.offsets_at(wanted, time_us))

    async def open_catch_up(self) -> "CatchUp":
        """A reader of older entries. The caller holds one of `catch_up_permits`, and closes it."""
        executor = self._catch_up_executor
        reader = await asyncio.get_running_loop().run_in_executor(executor, self._open_small)
        return CatchUp(reader, executor)

    def drain(self, reason: str) -> None:
        """Asks all subscriptions to end."""
        self.draining = reason
        self.news.tell()

    async def _follow(self, reader: LogReader, backoff: Backoff) -> None:
        topics = (self._kafka.records_topic, self._kafka.results_topic)
        partitions = await self._on_reader(lambda: reader.partitions(topics))
        bounds = await self._on_reader(lambda: reader.bounds(partitions))
        share = max(1, self._config.ring_bytes_max // len(partitions))
        self.rings = {partition: Ring(bounds[partition].high, share) for partition in partitions}
        await self._on_reader(lambda: reader.assign({partition: b.high for partition, b in bounds.items()}))
        self._telemetry.emit(LOG_READY, count=len(partitions))
        self._set_ready(ready=True)
        while True:
            entries = await self._on_reader(lambda: reader.read(READ_ENTRIES_MAX, READ_TIMEOUT_S))
            if entries:
                backoff.reset()
                self._outage = False
                for entry in entries:
                    self.rings[entry.partition].append(entry.offset, entry, len(entry.value) + ENTRY_OVERHEAD_BYTES)
                self.news.tell()

    def _set_ready(self, *, ready: bool) -> None:
        for event, holds in ((self.ready, ready), (self.not_ready, not ready)):
            event.set() if holds else event.clear()

    def _waiting(self, detail: str) -> None:
        """Says that Kafka is away, once per outage; called from any thread."""
        if not self._outage:
            self._outage = True
            self._telemetry.emit(LOG_WAITING, detail=detail, bootstrap_servers=self._kafka.bootstrap_servers)

    def _open_reader(self) -> LogReader:
        return LogReader(self._kafka, queue_bytes_max=self._config.read_ahead_bytes_max, on_error=self._waiting)

    def _open_small(self) -> LogReader:
        return LogReader(self._kafka, queue_bytes_max=SMALL_QUEUE_BYTES, on_error=self._waiting)

    def _open_prober(self) -> LogReader:
        return LogReader(
            self._kafka,
            queue_bytes_max=SMALL_QUEUE_BYTES,
            on_error=self._waiting,
            fetch_wait_ms=PROBE_FETCH_WAIT_MS,
        )

    async def _on_reader(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def _close(self, reader: LogReader | None) -> None:
        if reader is not None:
            await self._on_reader(reader.close)
        await self._prober.close()
        self._executor.shutdown(wait=False)
        self._catch_up_executor.shutdown(wait=False)


class CatchUp:
    """Reads what a ring no longer holds, for one subscription."""

    def __init__(self, reader: LogReader, executor: ThreadPoolExecutor) -> None:
        self._reader = reader
        self._executor = executor
        self._partitions: frozenset[Partition] = frozenset()

    async def read(self, behind: Mapping[Partition, int], entries_max: int) -> list[Entry]:
        """The next entries of the partitions that are behind, given the offset that each wants next.

        It may give entries below a wanted offset (from before the partition fell behind again): pass them over.

        Raises:
            OffsetGone: when Kafka no longer has what is wanted.
        """
        if self._partitions != behind.keys():
            positions = dict(behind)
            await self._run(lambda: self._reader.assign(positions))
            self._partitions = frozenset(behind)
        return await self._run(lambda: self._reader.read(entries_max, READ_TIMEOUT_S))

    async def close(self) -> None:
        """Ends the connection."""
        await self._run(self._reader.close)

    async def _run(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


class _Prober:
    """Answers questions about the log on a connection of its own; a flood of equal questions costs two answers."""

    def __init__(self, open_reader: Callable[[], LogReader]) -> None:
        self._open = open_reader
        self._reader: LogReader | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="feed-prober")
        self._lock = asyncio.Lock()
        self._begun = 0
        self._last: Mapping[Partition, Bounds] = {}

    async def bounds(self, partitions: list[Partition]) -> Mapping[Partition, Bounds]:
        seen = self._begun
        async with self._lock:
            # An answer that was begun after we asked is as fresh as one of our own.
            if self._begun == seen:
                self._begun += 1
                self._last = await self._run(lambda reader: reader.bounds(partitions))
            return self._last

    async def ask(self, question: Callable[[LogReader], _T]) -> _T:
        async with self._lock:
            return await self._run(question)

    async def close(self) -> None:
        if self._reader is not None:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._reader.close)
        self._executor.shutdown(wait=False)

    async def _run(self, question: Callable[[LogReader], _T]) -> _T:
        def work() -> _T:
            if self._reader is None:
                self._reader = self._open()
            return question(self._reader)

        return await asyncio.get_running_loop().run_in_executor(self._executor, work)
