"""Length buckets: a fine ladder that texts are grouped by, and the classic classes that people read. Pure.

For edges with ratio r a text is padded by about 1 - (r-1)/(r*ln r) of the batch when lengths are
log-uniform: 4% for r = 4/3 and 31% for r = 2, hence a ladder of about 1.3 to 1.5 inside the classic
32/64/128/256/512.
"""

from bisect import bisect_left
from collections.abc import Sequence


class Ladder:
    """Ascending bucket edges that end at the model's longest input.

    Args:
        edges: ascending lengths in tokens.
        length_max: longest input in tokens; edges above it are dropped and it becomes the last edge.
    """

    def __init__(self, edges: Sequence[int], length_max: int) -> None:
        assert length_max > 0
        self.edges = (*(edge for edge in edges if edge < length_max), length_max)

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
