"""How a backlog is cut into batches, and what share of the computed tokens is padding then. Pure."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

CLASSIC = (32, 64, 128, 256)
ROWS = 32


class Batch(NamedTuple):
    """Positions of the texts in it, and the length they are padded to."""

    rows: tuple[int, ...]
    length: int


def arrival(lengths: Sequence[int], rows: int = ROWS) -> list[Batch]:
    """In the order of arrival, padded to the longest of the batch."""
    return [_exact(range(start, min(start + rows, len(lengths))), lengths) for start in range(0, len(lengths), rows)]


def windowed(lengths: Sequence[int], window: int, rows: int = ROWS) -> list[Batch]:
    """Sorted by length inside windows of `window` texts."""
    plan = []
    for start in range(0, len(lengths), window):
        order = sorted(range(start, min(start + window, len(lengths))), key=lengths.__getitem__, reverse=True)
        plan += [_exact(order[i : i + rows], lengths) for i in range(0, len(order), rows)]
    return plan


def bucketed(
    lengths: Sequence[int], edges: Sequence[int], *, rows: int = 0, tokens: int = 0, exact: bool = False
) -> list[Batch]:
    """One queue per bucket; a batch leaves at `rows` texts or `tokens` padded tokens, padded to the edge or exactly."""
    queues: dict[int, list[int]] = {}
    plan: list[Batch] = []

    def leave(edge: int) -> None:
        members = queues.pop(edge)
        plan.append(_exact(members, lengths) if exact else Batch(tuple(members), edge))

    for position, length in enumerate(lengths):
        edge = edges[min(bisect_left(edges, length), len(edges) - 1)]
        queue = queues.setdefault(edge, [])
        queue.append(position)
        if len(queue) == rows or (tokens and (len(queue) + 1) * edge > tokens):
            leave(edge)
    for edge in sorted(queues):
        leave(edge)
    return plan


def share(plan: Iterable[Batch], lengths: Sequence[int]) -> float:
    """Of the computed tokens, those that were padding."""
    plan = list(plan)
    computed = sum(len(batch.rows) * batch.length for batch in plan)
    return 1 - sum(lengths[i] for batch in plan for i in batch.rows) / computed


def policies(lengths: Sequence[int], ladder: Sequence[int], budget: int) -> dict[str, float]:
    """Padding share of each policy over a backlog."""
    eights = tuple(range(8, max(lengths) + 8, 8))
    plans = {
        "arrival order, 32 rows": arrival(lengths),
        "sorted within 128": windowed(lengths, 128),
        "sorted within 512": windowed(lengths, 512),
        "sorted within 2,048": windowed(lengths, 2048),
        "classic buckets, 32 rows": bucketed(lengths, CLASSIC, rows=ROWS),
        "multiples of 8": bucketed(lengths, eights, tokens=budget),
        "fine ladder, to the edge": bucketed(lengths, ladder, tokens=budget),
        "fine ladder, to the longest": bucketed(lengths, ladder, tokens=budget, exact=True),
    }
    return {name: share(plan, lengths) for name, plan in plans.items()}


def _exact(rows: Iterable[int], lengths: Sequence[int]) -> Batch:
    members = tuple(rows)
    return Batch(members, max(lengths[i] for i in members))
