"""Length buckets: a ladder of edges, and the finer classes inside it that texts are grouped by. Pure.

For edges with ratio r a text is padded by about 1 - (r-1)/(r*ln r) of the batch when lengths are
log-uniform: 13% for r = 4/3 and 28% for r = 2, hence a ladder of about 1.3 to 1.5 inside the classic
32/64/128/256/512. A device that takes any shape pads to the longest row of the batch only; there the ladder
is refined into classes of a thirty-second of their bucket's length: texts of nearly equal length meet, and
what is left of the padding comes from filling up with neighbours, which the scheduler weighs by cost.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

# Parts that a bucket of twice the length of the one before it is refined into.
PARTS: Final = 32


class Ladder:
    """Ascending bucket edges that end at the model's longest input.

    Args:
        edges: ascending lengths in tokens.
        length_max: longest input in tokens; edges above it are dropped and it becomes the last edge.
    """

    def __init__(self, edges: Sequence[int], length_max: int) -> None:
        assert length_max > 0
        self.edges = (*(edge for edge in edges if edge < length_max), length_max)

    def refined(self, parts: int = PARTS) -> "Ladder":
        """The same ladder with finer edges between its own, each at most a `parts`-th of its bucket's edge apart."""
        fine: list[int] = []
        low = 0
        for edge in self.edges:
            step = max(1, edge // parts)
            fine += [*range(low + step, edge, step), edge]
            low = edge
        return Ladder(fine, self.edges[-1])

    def index(self, tokens: int) -> int:
        """The bucket of a text of `tokens` tokens; 0 is the shortest.

        Raises:
            ValueError: when it is longer than the last edge: truncation comes before bucketing.
        """
        position = bisect_left(self.edges, tokens)
        if position == len(self.edges):
            raise ValueError(f"{tokens} tokens exceed the longest bucket of {self.edges[-1]}")
        return position

    def edge(self, tokens: int) -> int:
        """The padded length of a text of `tokens` tokens."""
        return self.edges[self.index(tokens)]


def reporting_class(length: int, classes: Sequence[int]) -> int:
    """The class (its upper edge) that a batch of padded `length` is counted under; the last one takes the rest."""
    return classes[min(bisect_left(classes, length), len(classes) - 1)]
