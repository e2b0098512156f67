"""One subscription: from positions to serialised messages, without loss, gap or repeat.

Per partition a subscription knows the next position. It takes entries from the ring while the ring is complete there;
below that it reads Kafka with a consumer of its own until the position is back in the ring. Where an entry comes from
never matters: each source gives all entries in order from the wanted offset on, and an entry is passed on if and only
if its offset is at or above the position, which then moves behind it. So the seams are exact by construction.

Memory: one entry being sent, `entries` of one read, and librdkafka's bounded queue while catching up.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Final

from central.config import FeedConfig
from central.feed_batches import Entry, Part, build, build_selected, drain_body, heartbeat_body, message, peek
from central.feed_hub import CatchUp, FeedHub
from central.feed_log import OffsetGone
from central.filters import FeedFilter
from central.part_cache import PartCache
from central.tokens import Partition, Position, ResumePoint, TokenSigner
from protos import feed_pb2
from sluice.codec import Limits
from sluice.errors import Backpressure, Permanent
from sluice.telemetry import Event, Telemetry

ENTRY_SKIPPED = Event(
    name="feed_entry_skipped",
    unit="entries",
    help="Entries of the log that do not decode; the lake quarantines them.",
    labels=("topic",),
    level="warning",
)
READ_ENTRIES: Final = 16


class Maker:
    """Makes the parts of entries, shared between subscriptions: decoding runs on a thread, once per entry.

    Args:
        config: sizes.
        limits: of envelopes.
        telemetry: for its events.
    """

    def __init__(self, config: FeedConfig, limits: Limits, telemetry: Telemetry) -> None:
        self._limits = limits
        self._batch_bytes_max = config.batch_bytes_max
        self._cache = PartCache(config.part_cache_bytes_max)
        self._telemetry = telemetry

    async def parts(self, entry: Entry, selection: FeedFilter, first_index: int, epoch: int) -> Sequence[Part]:
        """What the filter passes of an entry, from its record number `first_index` on; nothing of one that is broken.

        Args:
            entry: of the log.
            selection: the filter.
            first_index: records below it were sent already.
            epoch: of the log: a re-created topic uses offsets again.
        """
        try:
            origin = peek(entry)
            if not selection.passes(origin.site, origin.device, origin.stream):
                return ()
            if entry.kind == feed_pb2.KIND_RESULTS and selection.looks_into_results:
                return await asyncio.to_thread(build_selected, entry, selection)
            if first_index:
                return await asyncio.to_thread(build, entry, self._limits, self._batch_bytes_max, first_index)
            key = (epoch, entry.partition, entry.offset)
            return await self._cache.get(key, lambda: build(entry, self._limits, self._batch_bytes_max))
        except Permanent as error:
            topic, number = entry.partition
            detail = f"{topic}/{number} offset {entry.offset}: {error}"
            self._telemetry.emit(ENTRY_SKIPPED, topic=topic, detail=detail)
            return ()


class Subscription:
    """See the module's docstring.

    Args:
        hub: the live end of the log.
        maker: of messages.
        signer: of tokens.
        config: times.
        selection: what the client wants.
        point: where it begins.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        hub: FeedHub,
        maker: Maker,
        signer: TokenSigner,
        config: FeedConfig,
        selection: FeedFilter,
        point: ResumePoint,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hub = hub
        self._maker = maker
        self._signer = signer
        self._config = config
        self._selection = selection
        self._positions = dict(point.positions)
        self._not_before_us = point.not_before_us
        self._clock = clock
        self._epoch = hub.epoch
        self._sent_at = clock()
        self._catch_up: CatchUp | None = None
        self._lagging: AbstractSet[Partition] = frozenset()

    async def messages(self) -> AsyncGenerator[bytes, None]:
        """Serialised `FeedBatch`es: first a heartbeat, at the end (when the hub drains) a drain.

        Raises:
            OffsetGone: when Kafka no longer has what comes next.
            Backpressure: when too many subscriptions are catching up.
        """
        yield self._quiet()
        try:
            while True:
                self._check_epoch()
                news = self._hub.news.listen()
                behind = self._behind()
                entries = self._from_rings(behind)
                if behind:
                    entries += await self._from_log(behind)
                else:
                    await self._end_catch_up()
                async for sent in self._pass(entries):
                    yield sent
                if self._hub.draining is not None:
                    yield message(drain_body(self._hub.draining), self.token())
                    return
                if not entries and not behind:
                    await self._wait(news)
                if self._clock() - self._sent_at >= self._config.heartbeat_s:
                    yield self._quiet()
                await asyncio.sleep(0)  # a filter that passes nothing must not keep the loop from the others
        finally:
            await self._end_catch_up()

    def token(self) -> bytes:
        """Covers everything that was given so far."""
        return self._signer.issue(ResumePoint(self._positions, self._not_before_us))

    def _from_rings(self, behind: Mapping[Partition, int]) -> list[Entry]:
        found: list[Entry] = []
        for partition, position in self._positions.items():
            if partition not in behind:
                found.extend(self._hub.rings[partition].read(position.offset, READ_ENTRIES) or ())
        return found

    def _behind(self) -> dict[Partition, int]:
        """The partitions that are read from Kafka, and the offset that each wants next.

        A partition falls behind when its offset has left the ring, and is back when it has reached the ring's middle:
        at the edge it would fall behind again with the next entry, and each time costs a new fetch.
        """
        behind: dict[Partition, int] = {}
        for partition, (offset, _) in self._positions.items():
            ring = self._hub.rings[partition]
            enough = (ring.start_offset + ring.end_offset) // 2 if partition in self._lagging else ring.start_offset
            if offset < enough:
                behind[partition] = offset
        self._lagging = behind.keys()
        return behind

    async def _from_log(self, behind: Mapping[Partition, int]) -> list[Entry]:
        if self._catch_up is None:
            await self._begin_catch_up()
        assert self._catch_up is not None
        return await self._catch_up.read(behind, READ_ENTRIES)

    async def _begin_catch_up(self) -> None:
        wait_s = self._config.catch_up_wait_s
        try:
            async with asyncio.timeout(wait_s):
                await self._hub.catch_up_permits.acquire()
        except TimeoutError:
            text = f"{self._config.catch_up_max} subscribers are catching up already (feed.catch_up_max)"
            raise Backpressure(text, retry_after_s=wait_s) from None
        try:
            self._catch_up = await self._hub.open_catch_up()
        except BaseException:
            self._hub.catch_up_permits.release()
            raise

    async def _end_catch_up(self) -> None:
        if self._catch_up is not None:
            catch_up, self._catch_up = self._catch_up, None
            self._hub.catch_up_permits.release()
            # Closing takes a moment and must happen even when the stream was cancelled meanwhile.
            with contextlib.suppress(RuntimeError):
                await asyncio.shield(catch_up.close())

    async def _pass(self, entries: Sequence[Entry]) -> AsyncGenerator[bytes, None]:
        for entry in entries:
            position = self._positions.get(entry.partition)
            if position is None or entry.offset < position.offset:
                continue
            first_index = position.record_index if entry.offset == position.offset else 0
            if entry.append_time_us >= self._not_before_us:
                for part in await self._maker.parts(entry, self._selection, first_index, self._epoch):
                    if part.stop_index:
                        self._positions[entry.partition] = Position(entry.offset, part.stop_index)
                    else:
                        self._positions[entry.partition] = Position(entry.offset + 1)
                    self._sent_at = self._clock()
                    yield message(part.body, self.token())
            self._positions[entry.partition] = Position(entry.offset + 1)
            if self._hub.draining is not None:
                return

    async def _wait(self, news: asyncio.Event) -> None:
        left_s = self._sent_at + self._config.heartbeat_s - self._clock()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, left_s)):
                await news.wait()

    def _quiet(self) -> bytes:
        self._sent_at = self._clock()
        return message(heartbeat_body(time.time_ns() // 1000), self.token())

    def _check_epoch(self) -> None:
        if self._hub.epoch != self._epoch:
            partition, position = next(iter(self._positions.items()))
            raise OffsetGone(partition, position.offset)
