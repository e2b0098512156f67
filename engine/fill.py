"""Which waiting texts share a padded batch with the one that leads it. Pure.

Texts are counted by length class. A row costs what the batch's longest row costs, so a batch is a top class
and what is filled in from the classes below it. A shorter row rides along when that, padded, is cheaper than
its share of a batch of its own kind: the launch of such a batch is shared by the rows that wait at about its
length, and by about as many that will have come until it runs. The same rule says how far the top may lie
above the class that leads. Of the tops that are left the one is taken whose batch wastes least: the share of
its time that goes into real tokens is highest.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

from engine.cost import CostModel

# What counts as "about its length": down to this share of it. The neighbours of a batch of the row's own kind.
KIN: Final = 0.75
# The share of such a batch's launch that falls to those who wait already. Simulated on a log-normal mix at 50 to 95%
# load (benchmarks/engine/scheduling.py): 1 pads 8 to 12% and is slower for everybody than 0.5 with 4 to 7%; below,
# batches grow smaller and background texts wait longer.
LAUNCH_SHARE: Final = 0.5


class Filling:
    """The choice for one batch.

    Args:
        edges: of the classes, ascending.
        waiting: texts per class.
        tokens: padded tokens that the batch may have.
        rows: rows that it may have.
        cost: of the device.
        row_steps: numbers of rows that it computes, ascending; any when empty. A full batch has such a number.
    """

    def __init__(
        self,
        edges: Sequence[int],
        waiting: Sequence[int],
        tokens: int,
        rows: int,
        cost: CostModel,
        row_steps: Sequence[int] = (),
    ) -> None:
        self._edges = edges
        self._waiting = waiting
        self._tokens = tokens
        self._rows = rows
        self._row_steps = row_steps
        self._launch_s = cost.launch_s
        self._present = [i for i, count in enumerate(waiting) if count]
        self._place = {bucket: place for place, bucket in enumerate(self._present)}
        self._row_s = {i: cost.marginal_s(edges[i]) for i in self._present}
        self._worth_s = {i: self._row_s[i] + LAUNCH_SHARE * self._launch_s / self._kin(i) for i in self._present}

    @property
    def present(self) -> Sequence[int]:
        """Classes in which something waits, ascending."""
        return self._present

    def rows_max(self, top: int) -> int:
        """Rows of a batch padded to class `top`; at least one."""
        most = max(1, min(self._rows, self._tokens // self._edges[top]))
        place = bisect_right(self._row_steps, most)
        return self._row_steps[place - 1] if 0 < place < len(self._row_steps) else most

    def pays(self, bucket: int, top: int) -> bool:
        """Whether a row of `bucket` costs less padded to `top` than its share of a batch of its own kind."""
        return self._row_s[top] <= self._worth_s[bucket]

    def riders(self, top: int) -> list[int]:
        """The classes that may share a batch padded to class `top`, the longest first, until it is full."""
        left = self.rows_max(top)
        found = []
        for place in range(self._place[top], -1, -1):
            bucket = self._present[place]
            # The shorter, the dearer the ride; a class with many of its kind may decline and a shorter one not.
            if self.pays(bucket, top):
                found.append(bucket)
                left -= self._waiting[bucket]
            if left <= 0:
                break
        return found

    def efficiency(self, top: int) -> float:
        """The share of the time of a batch padded to class `top` that goes into real tokens."""
        most = left = self.rows_max(top)
        useful_s = 0.0
        for bucket in self.riders(top):
            count = min(left, self._waiting[bucket])
            useful_s += count * self._row_s[bucket]
            left -= count
        return useful_s / max(self._launch_s + (most - left) * self._row_s[top], 1e-12)

    def top(self, lead: int) -> int:
        """The class that a batch led by class `lead` is best padded to."""
        best, most = lead, -1.0
        for place in range(self._place[lead], len(self._present)):
            candidate = self._present[place]
            if not self.pays(lead, candidate):
                break
            useful = self.efficiency(candidate)
            if useful > most:
                best, most = candidate, useful
        return best

    def _kin(self, bucket: int) -> int:
        """Rows of a batch of the class's own kind, with what waits now."""
        most = self.rows_max(bucket)
        least = KIN * self._edges[bucket]
        count = 0
        for place in range(self._place[bucket], -1, -1):
            other = self._present[place]
            if self._edges[other] < least or count >= most:
                break
            count += self._waiting[other]
        return min(count, most)
