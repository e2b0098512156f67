"""Which offset of a partition may be committed when entries finish out of order. Pure.

Invariant: `committable` is the lowest offset that was begun and is not finished (or the one behind the last finished,
when all are), so nothing below it is unfinished. A restart there repeats work but loses none.
"""

from collections import OrderedDict


class OffsetTracker:
    """The entries of one partition that are in flight. Offsets are begun in ascending order."""

    __slots__ = ("_committable", "_finished")

    def __init__(self) -> None:
        self._finished: OrderedDict[int, bool] = OrderedDict()
        self._committable: int | None = None

    def begin(self, offset: int) -> None:
        """Work on the entry at `offset` starts."""
        assert not self._finished or offset > next(reversed(self._finished)), "offsets are begun in ascending order"
        self._finished[offset] = False

    def finish(self, offset: int) -> None:
        """Work on it is done and durable."""
        assert self._finished.get(offset) is False, f"offset {offset} is finished once, after it was begun"
        self._finished[offset] = True
        while self._finished:
            first, done = next(iter(self._finished.items()))
            if not done:
                return
            del self._finished[first]
            self._committable = first + 1

    @property
    def committable(self) -> int | None:
        """The offset to commit; None before anything finished."""
        return self._committable

    @property
    def in_flight(self) -> int:
        """Entries that were begun and are not behind `committable` yet."""
        return len(self._finished)
