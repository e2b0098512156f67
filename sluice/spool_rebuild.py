"""Makes the spool's databases: an empty one, and a fresh one of what a damaged one still holds.

Both are made beside the old one and renamed into place, so a crash at any point leaves the old one or the new one.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from msgspec.structs import replace

from sluice.intervals import IntervalSet
from sluice.record import SPOOL_ID_BYTES
from sluice.spool_disk import LINEAGE_MAX, PRIORITY_MAX, Change, ItemCache, ItemKey, ItemTag, State
from sluice.spool_errors import Damaged
from sluice.spool_files import SpoolDirectory
from sluice.spool_index import head_runs
from sluice.spool_recovery import Salvage, open_read_only, read_payload, salvage

# What one transaction of the copy writes.
_COPY_BYTES: Final = 4 * 1024 * 1024
_COPY_ITEMS: Final = 256

Declare = Callable[[bytes, int, int, bytes | None], bytes]


@dataclass(slots=True)
class RecoveryReport:
    """What a recovery kept and lost.

    Attributes:
        lost: runs `(lineage, start, stop)` that were declared expired.
        old_spool_id: set when sequences may have been allocated that the intact part does not know of, so that a new
            spool_id was begun. What that part held is then unknown, beyond `lost`.
    """

    kept_items: int = 0
    kept_records: int = 0
    lost: list[tuple[int, int, int]] = field(default_factory=list)
    old_spool_id: str | None = None
    spool_id: str = ""

    @property
    def lost_records(self) -> int:
        """Records declared expired."""
        return sum(stop - start for _, start, stop in self.lost)

    def fields(self) -> dict[str, Any]:
        """For the event."""
        return {
            "kept_items": self.kept_items,
            "kept_records": self.kept_records,
            "lost_records": self.lost_records,
            "lost_ranges": self.lost[:16],
            "spool_id": self.spool_id,
            "old_spool_id": self.old_spool_id,
        }


def make_empty(directory: SpoolDirectory, owner: str) -> None:
    """A database without items, under a new spool_id; durable when this returns."""
    cache = ItemCache(directory.start_new())
    try:
        cache.commit(Change(), _new_state(owner, 0, {}))
    finally:
        cache.close()
    directory.put_new_in_place()


def rebuild(
    directory: SpoolDirectory, owner: str, declare: Declare, item_records_max: int, pending_runs_max: int
) -> RecoveryReport:
    """Puts a fresh database in the place of `directory.damaged`."""
    found = salvage(directory.damaged)
    report = RecoveryReport()
    state = found.state or _succeed(found, owner, report)
    cache = ItemCache(directory.start_new())
    try:
        kept = _copy(directory, found, cache, state, report)
        report.lost = _lost_runs(found, state, kept)
        for change in _receipts(report.lost, state, declare, item_records_max):
            cache.commit(change, state)
        pending = IntervalSet(
            (row.key.first_sequence, row.stop_sequence) for row in cache.rows.scan() if row.key.lineage == state.lineage
        )
        runs = head_runs(pending, pending_runs_max, state.next_sequence)
        expired = state.expired_records + report.lost_records
        cache.commit(Change(cursors=dict(found.cursors)), replace(state, pending=runs, expired_records=expired))
    finally:
        cache.close()
    directory.put_new_in_place()
    report.spool_id = state.spool_id.hex()
    return report


def _new_state(owner: str, lineage: int, lineages: dict[int, bytes]) -> State:
    return State(
        owner=owner,
        spool_id=os.urandom(SPOOL_ID_BYTES),
        lineage=lineage,
        next_sequence=0,
        expired_records=0,
        pending=(),
        lineages=lineages,
    )


def _succeed(found: Salvage, owner: str, report: RecoveryReport) -> State:
    """The state of a new spool_id beside the lineages that still have items."""
    lineages = {item.row.key.lineage: item.spool_id for item in found.items}
    report.old_spool_id = lineages[max(lineages)].hex() if lineages else "unknown"
    taken = set(lineages) | {row.key.lineage for row in found.claimed}
    # Any unused number serves; the highest taken one plus one keeps the older ones first.
    lineage = next(
        n for n in (*range(max(taken, default=-1) + 1, LINEAGE_MAX + 1), *range(LINEAGE_MAX)) if n not in taken
    )
    return _new_state(owner, lineage, lineages)


def _copy(
    directory: SpoolDirectory, found: Salvage, cache: ItemCache, state: State, report: RecoveryReport
) -> dict[int, IntervalSet]:
    """Copies what is intact; returns the sequences kept, by lineage."""
    kept: dict[int, IntervalSet] = {}
    if not found.items:
        return kept
    with contextlib.closing(open_read_only(directory.damaged)) as connection:
        change, size = Change(), 0
        for item in found.items:
            row = item.row
            try:
                payload = read_payload(connection, item)
            except Damaged:
                found.claimed.append(row)
                continue
            change.puts[row.key.pack()] = (row.tag.pack(), item.spool_id + payload)
            size += len(payload)
            kept.setdefault(row.key.lineage, IntervalSet()).add(row.key.first_sequence, row.stop_sequence)
            report.kept_items += 1
            report.kept_records += row.tag.record_count
            if size >= _COPY_BYTES or len(change.puts) >= _COPY_ITEMS:
                cache.commit(change, state)
                change, size = Change(), 0
        cache.commit(change, state)
    return kept


def _lost_runs(found: Salvage, state: State, kept: dict[int, IntervalSet]) -> list[tuple[int, int, int]]:
    """Runs `(lineage, start, stop)` that were unsettled and are not intact.

    Of the current lineage the state knows them; of others only the keys of rows whose content is gone can tell.
    """
    lost: dict[int, IntervalSet] = {}
    for start, stop in state.pending:
        lost.setdefault(state.lineage, IntervalSet()).add(start, stop)
    for row in found.claimed:
        if row.key.lineage in state.lineages:
            lost.setdefault(row.key.lineage, IntervalSet()).add(row.key.first_sequence, row.stop_sequence)
    for lineage, runs in kept.items():
        for start, stop in runs.runs():
            lost.get(lineage, IntervalSet()).remove(start, stop)
    return [(lineage, start, stop) for lineage, runs in sorted(lost.items()) for start, stop in runs.runs()]


def _receipts(
    lost: list[tuple[int, int, int]], state: State, declare: Declare, item_records_max: int
) -> Iterator[Change]:
    """Receipts for the lost runs, ahead of everything else."""
    for lineage, start, stop in lost:
        spool_id = state.spool_id if lineage == state.lineage else state.lineages[lineage]
        for first in range(start, stop, item_records_max):
            count = min(item_records_max, stop - first)
            key = ItemKey(PRIORITY_MAX, lineage, first).pack()
            payload = declare(spool_id, first, count, None)
            yield Change(puts={key: (ItemTag(0, True, count).pack(), spool_id + payload)})
