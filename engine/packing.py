"""How the rows of a batch lie in memory: padded to one length, or packed one behind the other. Pure.

Packed, the rows stand sorted by length in one list of tokens, and rows of equal length are neighbours: a group.
What works on single tokens (linear layers, norms) sees the whole list and no padding. Attention and pooling work
on a group at a time, as [rows, length]: with equal lengths they need no mask, so nothing that one row holds, be it
infinite or no number at all, is ever multiplied into another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from engine.backend import Outputs, Rows

    Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbours of equal length.

    Attributes:
        start: of its first token.
        rows: how many.
        length: of each, in tokens.
    """

    start: int
    rows: int
    length: int

    @property
    def end(self) -> int:
        """Behind its last token."""
        return self.start + self.rows * self.length


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed batch.

    Attributes:
        ids: [tokens], the rows sorted by length, one behind the other.
        positions: [tokens], of each token in its row, from 0.
        groups: ascending by start; together they hold every token once.
        order: [rows], the place in the batch of each packed row.
    """

    ids: "Ints"
    positions: "Ints"
    groups: tuple[Group, ...]
    order: "npt.NDArray[np.intp]"

    def starts(self) -> "npt.NDArray[np.int64]":
        """The first token of each packed row, [rows]."""
        return np.concatenate([np.arange(group.start, group.end, group.length) for group in self.groups])

    def unpack(self, outputs: "npt.NDArray[Any]") -> "Outputs":
        """One array per row, in the order of the batch, from outputs per row, [rows, width], in packed order."""
        return list(outputs[np.argsort(self.order)])

    def unpack_tokens(self, outputs: "npt.NDArray[Any]") -> "Outputs":
        """One array [length, width] per row, in the order of the batch, from outputs per token, [tokens, width]."""
        parts: list[Any] = [None] * len(self.order)
        packed = 0
        for group in self.groups:
            for start in range(group.start, group.end, group.length):
                # A copy, so that a caller that keeps one row does not keep the batch.
                parts[self.order[packed]] = outputs[start : start + group.length].copy()
                packed += 1
        return parts


def pack(rows: "Rows") -> Packed:
    """Packs at least one row of at least one id each."""
    lengths = np.fromiter((len(row) for row in rows), np.int32, len(rows))
    # Stable, so that the same batch is always computed in the same order.
    order = np.argsort(lengths, kind="stable")
    ids = np.concatenate([rows[i] for i in order]).astype(np.int32, copy=False)
    found, counts = np.unique(lengths, return_counts=True)
    groups, start = [], 0
    for length, count in zip(found.tolist(), counts.tolist(), strict=True):
        groups.append(Group(start, count, length))
        start = groups[-1].end
    ascending = np.arange(int(found[-1]), dtype=np.int32)
    positions = np.concatenate([np.tile(ascending[: group.length], group.rows) for group in groups])
    return Packed(ids, positions, tuple(groups), order)


def pad(rows: "Rows", length: int) -> tuple["Ints", "Ints"]:
    """Rows as one int32 [rows, length], zeros behind each, and their lengths (int32).

    The id of the padding does not matter: it is masked out of attention and of pooling.
    """
    ids = np.zeros((len(rows), length), np.int32)
    lengths = np.fromiter((len(row) for row in rows), np.int32, len(rows))
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids, lengths


def cut(outputs: "npt.NDArray[Any]", lengths: Sequence[int]) -> "Outputs":
    """One array per row of a padded batch; of outputs per token ([rows, length, labels]) only those of real tokens."""
    if outputs.ndim == 2:
        return list(outputs)
    return [output[:length] for output, length in zip(outputs, lengths, strict=True)]
