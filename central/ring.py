"""The newest entries of one partition, bounded by bytes. Pure; touched by one thread.

Invariants:
  * The ring is complete over `[start_offset, end_offset)`: it holds every entry that the log has there. Offsets may
    have holes (transactions, compaction); an offset without an entry inside the range is a hole in the log itself.
  * `bytes_held <= bytes_max` always: the oldest entries leave first, if need be all of them.
So a position at or above `start_offset` can be served from here without loss, and a lower one has to read the log.
"""

from bisect import bisect_left
from typing import Final, Generic, TypeVar

E = TypeVar("E")
# Evicted slots are compacted away once there are this many and they are the greater part.
_COMPACT_SLOTS_MIN: Final = 64


class Ring(Generic[E]):
    """See the module's docstring.

    Args:
        start_offset: the first offset that will be appended (or a later one).
        bytes_max: size of all entries together.
    """

    __slots__ = ("_entries", "_head", "_offsets", "_sizes", "bytes_held", "bytes_max", "end_offset", "start_offset")

    def __init__(self, start_offset: int, bytes_max: int) -> None:
        assert start_offset >= 0
        assert bytes_max > 0
        self.bytes_max = bytes_max
        self.bytes_held = 0
        self.start_offset = start_offset
        self.end_offset = start_offset
        self._offsets: list[int] = []
        self._entries: list[E | None] = []
        self._sizes: list[int] = []
        self._head = 0

    def __len__(self) -> int:
        return len(self._offsets) - self._head

    def append(self, offset: int, entry: E, size_bytes: int) -> None:
        """Adds the entry at `offset`, which must not lie below `end_offset`; evicts what no longer fits."""
        assert offset >= self.end_offset, f"offset {offset} was passed already ({self.end_offset})"
        self._offsets.append(offset)
        self._entries.append(entry)
        self._sizes.append(size_bytes)
        self.bytes_held += size_bytes
        self.end_offset = offset + 1
        while self.bytes_held > self.bytes_max:
            self._evict()
        self._compact()

    def read(self, offset: int, entries_max: int) -> list[E] | None:
        """The next entries at or above `offset`, in order, at most `entries_max`.

        Returns:
            An empty list when there is nothing new yet; None when `offset` lies below `start_offset`.
        """
        if offset < self.start_offset:
            return None
        first = bisect_left(self._offsets, offset, self._head)
        found = self._entries[first : first + entries_max]
        return [entry for entry in found if entry is not None]

    def _evict(self) -> None:
        self.bytes_held -= self._sizes[self._head]
        self.start_offset = self._offsets[self._head] + 1
        self._entries[self._head] = None
        self._head += 1

    def _compact(self) -> None:
        if self._head >= _COMPACT_SLOTS_MIN and 2 * self._head >= len(self._offsets):
            del self._offsets[: self._head], self._entries[: self._head], self._sizes[: self._head]
            self._head = 0
