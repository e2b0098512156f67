"""Sets of sequence numbers as disjoint half-open intervals. Pure.

A spool's settled sequences, the gateway's memory of what it has seen, the lake's de-duplication state and the ledger
are all sets of integers that are nearly contiguous, so a sorted list of runs holds millions of them in a few bytes.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class IntervalSet:
    """A mutable set of non-negative integers, stored as sorted, disjoint, non-adjacent runs `[start, stop)`.

    `add`, `remove` and `covers` cost O(log runs) plus the runs they touch.
    """

    __slots__ = ("_starts", "_stops")

    def __init__(self, runs: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in runs:
            self.add(start, stop)

    def add(self, start: int, stop: int) -> int:
        """Adds `[start, stop)` and returns how many of its integers were new."""
        if start >= stop:
            return 0
        # Runs that overlap or touch [start, stop): those with run.stop >= start and run.start <= stop.
        low = bisect_left(self._stops, start)
        high = bisect_right(self._starts, stop)
        if low == high:
            self._starts.insert(low, start)
            self._stops.insert(low, stop)
            return stop - start
        known = sum(
            min(stop, self._stops[i]) - max(start, self._starts[i])
            for i in range(low, high)
            if self._stops[i] > start and self._starts[i] < stop
        )
        self._starts[low:high] = [min(start, self._starts[low])]
        self._stops[low:high] = [max(stop, self._stops[high - 1])]
        return stop - start - known

    def remove(self, start: int, stop: int) -> int:
        """Removes `[start, stop)` and returns how many integers were there."""
        inside = list(self.intersection(start, stop))
        if not inside:
            return 0
        low = bisect_right(self._stops, start)
        high = bisect_left(self._starts, stop)
        first, last = self._starts[low], self._stops[high - 1]
        left = [(first, start)] if first < start else []
        right = [(stop, last)] if last > stop else []
        kept = left + right
        self._starts[low:high] = [a for a, _ in kept]
        self._stops[low:high] = [b for _, b in kept]
        return sum(b - a for a, b in inside)

    def covers(self, start: int, stop: int) -> bool:
        """Whether every integer of `[start, stop)` is in the set."""
        if start >= stop:
            return True
        i = bisect_right(self._starts, start) - 1
        return i >= 0 and self._stops[i] >= stop

    def intersection(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The runs of `[start, stop)` that are in the set, in order."""
        if start >= stop:
            return
        i = bisect_right(self._stops, start)
        while i < len(self._starts) and self._starts[i] < stop:
            yield max(start, self._starts[i]), min(stop, self._stops[i])
            i += 1

    def missing(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The runs of `[start, stop)` that are not in the set, in order."""
        at = start
        for a, b in self.intersection(start, stop):
            if a > at:
                yield at, a
            at = b
        if at < stop:
            yield at, stop

    def runs(self) -> list[tuple[int, int]]:
        """All runs `[start, stop)`, sorted."""
        return list(zip(self._starts, self._stops, strict=True))

    def copy(self) -> "IntervalSet":
        """An independent copy."""
        new = IntervalSet()
        new._starts = self._starts.copy()
        new._stops = self._stops.copy()
        return new

    @property
    def run_count(self) -> int:
        """How many runs the set is made of (its memory)."""
        return len(self._starts)

    def __len__(self) -> int:
        return sum(self._stops) - sum(self._starts)

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and self.covers(value, value + 1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IntervalSet) and self.runs() == other.runs()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"IntervalSet({self.runs()!r})"


def runs_of(values: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Folds sorted distinct integers into runs `[start, stop)`."""
    start = stop = -1
    for value in values:
        if value == stop:
            stop += 1
            continue
        if stop > start:
            yield start, stop
        start, stop = value, value + 1
    if stop > start:
        yield start, stop
