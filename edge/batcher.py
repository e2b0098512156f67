"""Groups chunks into batches. Pure: it is handed the time.

Invariants:
  * Records of one `StreamKey` keep their order, and no batch mixes keys.
  * A batch closes at `bytes_target`, at `records_max`, at `age_s_max` after its first record, or, when somebody waits
    for one of its records, `commit_delay_s` after that one came.
  * Every batch keeps `bytes_max` and `records_max`; a chunk larger than that is cut into several.
  * A chunk completes with the batch that holds its last record; all batches of one call belong into one transaction of
    the spool, so a source's place is stored together with the records before it, or not at all.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from edge.records import FRAME_OVERHEAD_BYTES, Chunk, StreamKey

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """When a batch closes; bytes are uncompressed."""

    bytes_target: int
    bytes_max: int
    records_max: int
    age_s_max: float
    commit_delay_s: float


@dataclass(frozen=True, slots=True)
class Batch(Generic[T]):
    """A closed batch.

    Attributes:
        frames: its records, in order.
        completed: the chunks whose last record it holds, with the tokens that they came with.
    """

    key: StreamKey
    frames: list[bytes]
    oldest_time_us: int
    completed: list[tuple[Chunk, T]]


@dataclass(slots=True)
class _Open(Generic[T]):
    deadline_s: float
    frames: list[bytes] = field(default_factory=list)
    size_bytes: int = 0
    oldest_time_us: int = 0
    completed: list[tuple[Chunk, T]] = field(default_factory=list)


class Batcher(Generic[T]):
    """See the module's docstring. `T` is a token that comes back with the chunk.

    Args:
        limits: when a batch closes.
    """

    def __init__(self, limits: BatchLimits) -> None:
        assert 0 < limits.bytes_target <= limits.bytes_max, "0 < bytes_target <= bytes_max"
        self._limits = limits
        self._open: dict[StreamKey, _Open[T]] = {}

    def add(self, chunk: Chunk, token: T, now_s: float) -> list[Batch[T]]:
        """Takes a chunk; returns the batches that closed, in order.

        Args:
            chunk: at least one record, or only cursors.
            token: given back with the chunk when it completes.
            now_s: monotonic time.
        """
        limits = self._limits
        size = chunk.size_bytes
        closed: list[Batch[T]] = []
        current = self._open.get(chunk.key)
        if current is not None and not self._fits(current, chunk, size):
            closed.append(self._close(chunk.key))
            current = None
        if size > limits.bytes_max or len(chunk.frames) > limits.records_max:
            return [*closed, *self._cut(chunk, token)]
        if current is None:
            current = self._open[chunk.key] = _Open(now_s + limits.age_s_max, oldest_time_us=chunk.oldest_time_us)
        current.frames.extend(chunk.frames)
        current.size_bytes += size
        current.oldest_time_us = min(current.oldest_time_us, chunk.oldest_time_us)
        current.completed.append((chunk, token))
        if chunk.urgent:
            current.deadline_s = min(current.deadline_s, now_s + limits.commit_delay_s)
        if current.size_bytes >= limits.bytes_target or len(current.frames) >= limits.records_max:
            closed.append(self._close(chunk.key))
        return closed

    def due(self, now_s: float) -> list[Batch[T]]:
        """The batches whose time has come."""
        return [self._close(key) for key, batch in list(self._open.items()) if batch.deadline_s <= now_s]

    def flush(self) -> list[Batch[T]]:
        """All open batches."""
        return [self._close(key) for key in list(self._open)]

    def next_deadline_s(self) -> float | None:
        """When `due` has something to give; None when nothing is open."""
        return min((batch.deadline_s for batch in self._open.values()), default=None)

    def _fits(self, current: _Open[T], chunk: Chunk, size: int) -> bool:
        limits = self._limits
        return (
            current.size_bytes + size <= limits.bytes_max
            and len(current.frames) + len(chunk.frames) <= limits.records_max
        )

    def _close(self, key: StreamKey) -> Batch[T]:
        batch = self._open.pop(key)
        return Batch(key, batch.frames, batch.oldest_time_us, batch.completed)

    def _cut(self, chunk: Chunk, token: T) -> Iterator[Batch[T]]:
        """The batches of a chunk that is too large for one; the last one completes it."""
        limits = self._limits
        frames: list[bytes] = []
        size = 0
        for frame in chunk.frames:
            cost = len(frame) + FRAME_OVERHEAD_BYTES
            if frames and (size + cost > limits.bytes_max or len(frames) >= limits.records_max):
                yield Batch(chunk.key, frames, chunk.oldest_time_us, [])
                frames, size = [], 0
            frames.append(frame)
            size += cost
        yield Batch(chunk.key, frames, chunk.oldest_time_us, [(chunk, token)])
