"""De-duplication: the first fate of a position wins, be it a row or a gap. Pure.

The state is a *cache over the tables*: for each key (a spool; for results a spool and what was computed) the set of
positions that have met their fate, as runs. Positions of the batch that is being filled are kept apart, as pending:
they join the committed ones after the commit, and are forgotten when the batch is dropped.

Bounded by keys and by runs: the key that was touched longest ago is forgotten first, and read back from the tables when
it comes again (`read_back`). So memory is bounded and nothing is ever written twice.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Generic, TypeVar

from sluice.intervals import IntervalSet

K = TypeVar("K", bound=Hashable)


class Fates(Generic[K]):
    """Which positions have met their fate, by key.

    Args:
        keys_max: keys in memory.
        runs_max: runs in memory, all keys together.
        read_back: the committed positions of a key, from the tables; asked only for keys that may have been forgotten.
    """

    def __init__(self, keys_max: int, runs_max: int, read_back: Callable[[K], IntervalSet]) -> None:
        self._keys_max = keys_max
        self._runs_max = runs_max
        self._read_back = read_back
        self._committed: OrderedDict[K, IntervalSet] = OrderedDict()
        self._pending: dict[K, IntervalSet] = {}
        self._runs = 0
        # From the first forgotten key on, an unknown key may be a forgotten one.
        self.forgetful = False

    def claim(self, key: K, start: int, stop: int) -> list[tuple[int, int]]:
        """Claims positions for the batch that is being filled.

        Returns:
            The runs of `[start, stop)` that had no fate yet and have one now, in order.
        """
        committed = self._touch(key)
        pending = self._pending.setdefault(key, IntervalSet())
        fresh: list[tuple[int, int]] = []
        for a, b in committed.missing(start, stop):
            fresh.extend(pending.missing(a, b))
        for a, b in fresh:
            pending.add(a, b)
        return fresh

    def settle(self) -> None:
        """The batch is committed."""
        for key, runs in self._pending.items():
            self._add(key, runs.runs())
        self._pending.clear()
        self._forget()

    def drop(self) -> None:
        """The batch is dropped; its positions may come again."""
        self._pending.clear()

    def learn(self, found: Mapping[K, Iterable[tuple[int, int]]]) -> None:
        """Adds committed positions that were read from the tables; adding some again is fine.

        The first call must bring all that the tables hold; later ones what was committed since.
        """
        for key, runs in found.items():
            # A key that may be forgotten is read back whole when it comes; a part of it would pass for the whole.
            if key in self._committed or not self.forgetful:
                self._add(key, runs)
        self._forget()

    @property
    def keys(self) -> int:
        """Keys in memory."""
        return len(self._committed)

    @property
    def runs(self) -> int:
        """Runs in memory, without the pending ones."""
        return self._runs

    def _touch(self, key: K) -> IntervalSet:
        """The committed positions of a key, now the last to be forgotten."""
        runs = self._committed.get(key)
        if runs is None:
            runs = self._read_back(key) if self.forgetful else IntervalSet()
            self._committed[key] = runs
            self._runs += runs.run_count
        self._committed.move_to_end(key)
        return runs

    def _add(self, key: K, runs: Iterable[tuple[int, int]]) -> None:
        known = self._touch(key)
        before = known.run_count
        for start, stop in runs:
            known.add(start, stop)
        self._runs += known.run_count - before

    def _forget(self) -> None:
        while len(self._committed) > 1 and (len(self._committed) > self._keys_max or self._runs > self._runs_max):
            _, runs = self._committed.popitem(last=False)
            self._runs -= runs.run_count
            self.forgetful = True
