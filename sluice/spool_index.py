"""What the spool keeps in memory about its items, and the plan of what to drop. Pure: rows in, decisions out."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from sluice.intervals import IntervalSet
from sluice.spool_disk import ITEM_OVERHEAD_BYTES, ItemTag, Row, State
from sluice.spool_errors import Damaged


def cost_bytes(row: Row) -> int:
    """What an item counts against `bytes_max`."""
    return row.size_bytes + ITEM_OVERHEAD_BYTES


def head_runs(runs: IntervalSet, count_max: int, stop: int) -> tuple[tuple[int, int], ...]:
    """The first runs; when there are more than `count_max`, the last one is widened up to `stop`."""
    kept = tuple(islice(runs.intersection(0, stop), count_max + 1))
    if len(kept) <= count_max:
        return kept
    return (*kept[: count_max - 1], (kept[count_max - 1][0], stop))


class SpoolIndex:
    """Counters and unsettled runs.

    Attributes:
        pending: unsettled sequences, by lineage.
        items: number of items, by priority.
        bytes: what all items count against `bytes_max`.
    """

    __slots__ = ("bytes", "items", "pending")

    def __init__(self) -> None:
        self.pending: dict[int, IntervalSet] = {}
        self.items: Counter[int] = Counter()
        self.bytes = 0

    def runs(self, lineage: int) -> IntervalSet:
        """Unsettled sequences of a lineage."""
        return self.pending.setdefault(lineage, IntervalSet())

    def add(self, row: Row) -> int:
        """Counts an item; returns how many of its sequences were new."""
        self.items[row.key.priority] += 1
        self.bytes += cost_bytes(row)
        return self.runs(row.key.lineage).add(row.key.first_sequence, row.stop_sequence)

    def drop(self, row: Row) -> None:
        """Forgets an item; its sequences are for the caller to settle."""
        self.items[row.key.priority] -= 1
        self.bytes -= cost_bytes(row)

    def priorities(self) -> list[int]:
        """Priorities that have items, the lowest first."""
        return sorted(priority for priority, count in self.items.items() if count)

    def item_count(self) -> int:
        """Items of all priorities."""
        return sum(self.items.values())

    def record_count(self) -> int:
        """Unsettled sequences of all lineages."""
        return sum(len(runs) for runs in self.pending.values())


def index_rows(rows: Iterable[Row], state: State, pending_runs_max: int) -> SpoolIndex:
    """Counts all rows and compares them with the state.

    Raises:
        Damaged: rows are missing, overlap, or belong to nobody.
    """
    index = SpoolIndex()
    index.runs(state.lineage)
    for row in rows:
        if row.key.lineage != state.lineage and row.key.lineage not in state.lineages:
            raise Damaged(f"item {row.key.first_sequence} is of an unknown lineage")
        if index.add(row) != row.tag.record_count:
            raise Damaged(f"two items hold sequence {row.key.first_sequence}")
        if row.key.lineage == state.lineage and row.stop_sequence > state.next_sequence:
            raise Damaged("an item lies beyond next_sequence")
    # The last of many runs was widened, so it says nothing.
    exact = state.pending if len(state.pending) < pending_runs_max else state.pending[:-1]
    for start, stop in exact:
        if not index.pending[state.lineage].covers(start, stop):
            raise Damaged(f"unsettled items in [{start}, {stop}) are missing")
    return index


@dataclass(slots=True)
class Receipt:
    """A run to be declared expired: `head` is the item whose key it takes over."""

    head: Row
    record_count: int

    @property
    def stop_sequence(self) -> int:
        """The first sequence behind the run."""
        return self.head.key.first_sequence + self.record_count

    @property
    def tag(self) -> ItemTag:
        """The receipt's tag."""
        return self.head.tag._replace(receipt=True, record_count=self.record_count)


@dataclass(slots=True)
class DropPlan:
    """What to drop so that something else fits.

    Attributes:
        receipts: runs to declare; each replaces its head's row.
        victims: items that go, heads included.
        freed_bytes: estimated, receipts subtracted.
        expired_records: records that are newly declared expired.
    """

    receipts: list[Receipt] = field(default_factory=list)
    victims: list[Row] = field(default_factory=list)
    freed_bytes: int = 0
    freed_items: int = 0
    expired_records: int = 0


def plan_drop(
    rows: Iterable[Row], *, bytes_wanted: int, items_wanted: int, pinned: set[int], records_max: int, receipt_bytes: int
) -> DropPlan | None:
    """Chooses the items to drop.

    Args:
        rows: items in the order in which they may be dropped.
        bytes_wanted: to be freed.
        items_wanted: to be freed. Neighbours share one receipt, which is what frees items.
        pinned: keys that must stay as they are.
        records_max: sequences that one receipt may cover.
        receipt_bytes: what a receipt's row costs, estimated.

    Returns:
        None when there is not enough to drop.
    """
    plan = DropPlan()
    last: Receipt | None = None
    for row in rows:
        if plan.freed_bytes >= bytes_wanted and plan.freed_items >= items_wanted:
            break
        if row.key.pack() in pinned:
            last = None
        elif row.tag.receipt and not _joins(last, row, records_max):
            last = Receipt(row, row.tag.record_count)
        else:
            last = _take(plan, last, row, records_max, receipt_bytes)
    enough = plan.freed_bytes >= bytes_wanted and plan.freed_items >= items_wanted
    return plan if enough else None


def _joins(last: Receipt | None, row: Row, records_max: int) -> bool:
    return (
        last is not None
        and last.head.key[:2] == row.key[:2]
        and last.stop_sequence == row.key.first_sequence
        and last.record_count + row.tag.record_count <= records_max
    )


def _take(plan: DropPlan, last: Receipt | None, row: Row, records_max: int, receipt_bytes: int) -> Receipt:
    """Adds a victim: to the receipt before it, or under a new one."""
    plan.victims.append(row)
    plan.freed_bytes += cost_bytes(row)
    if not row.tag.receipt:
        plan.expired_records += row.tag.record_count
    if last is not None and _joins(last, row, records_max):
        if last.head not in plan.victims:
            # An older receipt grows: its row is rewritten.
            plan.victims.append(last.head)
            plan.freed_bytes += cost_bytes(last.head) - receipt_bytes
            plan.receipts.append(last)
        plan.freed_items += 1
        last.record_count += row.tag.record_count
        return last
    plan.freed_bytes -= receipt_bytes
    receipt = Receipt(row, row.tag.record_count)
    plan.receipts.append(receipt)
    return receipt
