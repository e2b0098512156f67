"""The durable spool: what was appended stays until it is settled, through kill -9, power cuts, a full disk and damage.

Invariants:
  * One spool is one space of sequences, `[0, next_sequence)`, under one random spool_id. `append` allocates; items,
    `next_sequence` and the sources' cursors become durable in one transaction, or none of them.
  * An item is opaque bytes that cover a run of sequences. It is read without being deleted, in the order of priority,
    then of sequence, and goes when all of its sequences are settled.
  * Bounded by bytes and items. When full: `block` raises Backpressure; `drop_oldest` replaces the oldest items of the
    lowest priority by receipts (payloads without records) that declare their sequences expired: the books close.
  * A sequence is never used twice. When damage leaves `next_sequence` in doubt, the spool goes on under a new spool_id;
    items of the old one keep theirs.
  * Damage costs the items that it hit, each of which is declared by a receipt, and is never a crash.

Memory: per priority a counter; per spool_id its unsettled runs (about 150 bytes each; one run unless items are settled
out of order), at most one per item, so at most `items_max` of them. Payloads are read when asked for.

Thread-safe. All calls do disk I/O; `append` and `settle` wait for an fsync.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, Self

from msgspec.structs import replace

from sluice.errors import Backpressure, Permanent
from sluice.intervals import IntervalSet
from sluice.spool_database import DAMAGED, EXPIRED, MIB, SpoolConfig, SpoolDatabase
from sluice.spool_disk import (
    ITEM_OVERHEAD_BYTES,
    ITEM_RECORDS_MAX,
    PRIORITY_MAX,
    SEQUENCE_MAX,
    Change,
    ItemKey,
    ItemTag,
    Row,
)
from sluice.spool_errors import Damaged, DiskFull
from sluice.spool_index import DropPlan, cost_bytes, head_runs, plan_drop
from sluice.spool_rebuild import Declare
from sluice.spool_types import Draft, SpoolDepth, SpoolItem, SpoolStatus
from sluice.telemetry import Telemetry

__all__ = ["Declare", "Draft", "Spool", "SpoolConfig", "SpoolDepth", "SpoolItem", "SpoolStatus"]

# CRC in front of a value.
_SEAL_BYTES: Final = 4
# A receipt's payload is about 100 bytes.
_RECEIPT_COST_BYTES: Final = ITEM_OVERHEAD_BYTES + 256
# When a full spool is worth another try, unless something is settled before.
_RETRY_AFTER_S: Final = 0.5


class Spool:
    """See the module's docstring. Use as a context manager, or `close` it.

    Args:
        config: directory and limits.
        owner: whose it is, such as `site/device`; another owner is refused, since items carry the name.
        declare: makes the payload of a receipt from (spool_id, first sequence, count, payload of the run's first
            item or None when that is damaged).
        telemetry: for events.
        item_records_max: sequences that one receipt may cover.

    Raises:
        ConfigError: another process has the directory, or it cannot be used.
        Permanent: the spool belongs to another owner.
    """

    def __init__(
        self,
        config: SpoolConfig,
        *,
        owner: str,
        declare: Declare,
        telemetry: Telemetry | None = None,
        item_records_max: int = 50_000,
    ) -> None:
        assert 1 <= item_records_max <= ITEM_RECORDS_MAX, "item_records_max fits the tag"
        self.config = config
        self._declare = declare
        self._item_records_max = item_records_max
        self._lock = threading.RLock()
        self._pinned: set[int] = set()
        self._db = SpoolDatabase(config, owner, declare, telemetry, item_records_max)

    # --- what callers use

    @property
    def spool_id(self) -> bytes:
        """Under which sequences are allocated now."""
        return self._db.state.spool_id

    @property
    def next_sequence(self) -> int:
        """The lowest sequence not yet allocated."""
        return self._db.state.next_sequence

    def append(self, drafts: Sequence[Draft], cursors: Mapping[str, bytes | None] | None = None) -> int:
        """Makes items and cursors durable, in one transaction.

        Args:
            drafts: get contiguous sequences, in order. May be empty.
            cursors: a source's place behind these drafts; None deletes it.

        Returns:
            The first sequence allocated.

        Raises:
            Backpressure: full (`when_full = "block"`), or the disk is; nothing was stored.
            Permanent: larger than the whole spool; nothing was stored.
        """
        with self._lock:
            return self._db.guarded(lambda: self._append(drafts, cursors or {}))

    def peek(self, *, exclude: Iterable[int] = (), items_max: int = 1, bytes_max: int = MIB) -> list[SpoolItem]:
        """The next items in the order of sending, without deleting them.

        Args:
            exclude: keys of items to pass over (those in flight).
            items_max: at most so many.
            bytes_max: payloads together, unless the first alone is larger.
        """
        with self._lock:
            return self._db.guarded(lambda: self._peek(frozenset(exclude), items_max, bytes_max))

    def settle(self, spool_id: bytes, runs: Iterable[tuple[int, int]]) -> int:
        """Settles the sequences of runs `[start, stop)`; items whose last sequence that was are deleted, durably.

        Returns:
            How many sequences were settled now. Unknown and already settled ones do not count.

        Raises:
            Retryable: the disk is full even without the ballast, or does not work. Nothing was settled.
        """
        with self._lock:
            wanted = list(runs)
            return self._db.guarded(lambda: self._settle(spool_id, wanted))

    def knows(self, spool_id: bytes) -> bool:
        """Whether sequences of this spool_id are or were allocated here."""
        with self._lock:
            return self._db.lineage_of(spool_id) is not None

    def pin(self, key: int) -> None:
        """Keeps `drop_oldest` away from an item that is in flight: it may have arrived."""
        with self._lock:
            self._pinned.add(key)

    def unpin(self, key: int) -> None:
        """Ends `pin`."""
        with self._lock:
            self._pinned.discard(key)

    def cursors(self) -> dict[str, bytes]:
        """The sources' places, by name."""
        with self._lock:
            return self._db.guarded(self._db.cache.cursors)

    def status(self, runs_max: int = 64) -> SpoolStatus:
        """Depth at this moment; of more than `runs_max` unsettled runs the last one is widened to cover the rest."""
        with self._lock:
            return self._db.guarded(lambda: self._status(runs_max))

    @property
    def depth(self) -> SpoolDepth:
        """What is unsettled; from memory."""
        with self._lock:
            index = self._db.index
            return SpoolDepth(index.record_count(), index.item_count(), index.bytes)

    @property
    def empty(self) -> bool:
        """Whether everything is settled."""
        return self._db.index.item_count() == 0

    def close(self) -> None:
        """Closes it; a second close does nothing."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _status(self, runs_max: int) -> SpoolStatus:
        state = self._db.state
        return SpoolStatus(
            spool_id=state.spool_id,
            next_sequence=state.next_sequence,
            records=self._db.index.record_count(),
            items=self._db.index.item_count(),
            bytes=self._db.index.bytes,
            expired_records=state.expired_records,
            oldest_time_us=self._oldest_time_us(),
            pending=head_runs(self._db.index.runs(state.lineage), runs_max, state.next_sequence),
            ballast=self._db.directory.has_ballast,
        )

    # --- append

    def _append(self, drafts: Sequence[Draft], cursors: Mapping[str, bytes | None]) -> int:
        state = self._db.state
        first = at = state.next_sequence
        change = Change(cursors=dict(cursors))
        rows = []
        for draft in drafts:
            assert 1 <= draft.record_count <= ITEM_RECORDS_MAX, "record_count fits the tag"
            assert 0 <= draft.priority <= PRIORITY_MAX, "priority is 0 to 9"
            key = ItemKey(draft.priority, state.lineage, at)
            tag = ItemTag(draft.oldest_time_us // 1000, False, draft.record_count)
            body = state.spool_id + draft.encode(state.spool_id, at)
            change.puts[key.pack()] = (tag.pack(), body)
            rows.append(Row(key, tag, len(body) + _SEAL_BYTES))
            at += draft.record_count
        if at > SEQUENCE_MAX:
            raise Permanent(f"spool {self._db.directory.path} has used all of its sequences; begin a new one")
        plan = self._make_room(sum(map(cost_bytes, rows)), len(rows))
        receipts = self._put_receipts(plan, change)
        self._db.index.runs(state.lineage).add(first, at)
        try:
            self._db.commit(
                change, replace(state, next_sequence=at, expired_records=state.expired_records + plan.expired_records)
            )
        except BaseException as error:
            self._db.index.runs(state.lineage).remove(first, at)
            if isinstance(error, DiskFull):
                raise Backpressure(str(error), retry_after_s=_RETRY_AFTER_S) from error
            raise
        for row in plan.victims:
            self._db.index.drop(row)
        for row in (*receipts, *rows):
            self._db.index.add(row)
        if plan.expired_records:
            self._db.emit(EXPIRED, count=plan.expired_records, priority=plan.victims[0].key.priority)
        return first

    def _make_room(self, bytes_needed: int, items_needed: int) -> DropPlan:
        """The plan of what must go so that this fits; an empty one when nothing must.

        Raises:
            Backpressure: it does not fit.
            Permanent: it never will.
        """
        config = self.config
        if bytes_needed > config.bytes_max or items_needed > config.items_max:
            raise Permanent(f"{bytes_needed} bytes do not fit spool.bytes_max = {config.bytes_max}")
        bytes_over = self._db.index.bytes + bytes_needed - config.bytes_max
        items_over = self._db.index.item_count() + items_needed - config.items_max
        if bytes_over <= 0 and items_over <= 0:
            return DropPlan()
        plan = None
        if config.when_full == "drop_oldest":
            plan = plan_drop(
                self._lowest_first(),
                bytes_wanted=bytes_over,
                items_wanted=items_over,
                pinned=self._pinned,
                records_max=self._item_records_max,
                receipt_bytes=_RECEIPT_COST_BYTES,
            )
        if plan is None:
            limit = (
                f"spool.bytes_max = {config.bytes_max}" if bytes_over > 0 else f"spool.items_max = {config.items_max}"
            )
            raise Backpressure(f"spool {self._db.directory.path} is full: {limit}", retry_after_s=_RETRY_AFTER_S)
        return plan

    def _lowest_first(self) -> Iterator[Row]:
        """Items in the order in which they may be dropped: lowest priority first, oldest first."""
        for priority in self._db.index.priorities():
            yield from self._db.scan_priority(priority)

    def _put_receipts(self, plan: DropPlan, change: Change) -> list[Row]:
        """Adds the plan to the change; returns the receipts' rows."""
        change.deletes.extend(row.key.pack() for row in plan.victims)
        rows = []
        for receipt in plan.receipts:
            head = receipt.head
            spool_id, payload = self._read(head)
            declared = self._declare(spool_id, head.key.first_sequence, receipt.record_count, payload)
            body = spool_id + declared
            change.puts[head.key.pack()] = (receipt.tag.pack(), body)
            rows.append(Row(head.key, receipt.tag, len(body) + _SEAL_BYTES))
        return rows

    # --- peek and settle

    def _peek(self, exclude: frozenset[int], items_max: int, bytes_max: int) -> list[SpoolItem]:
        items: list[SpoolItem] = []
        size = 0
        rows = [row for row in self._db.rows.scan(count_max=items_max + len(exclude)) if row.key.pack() not in exclude]
        for row in rows[:items_max]:
            if items and size + row.size_bytes > bytes_max:
                break
            size += row.size_bytes
            spool_id, payload = self._read(row)
            if payload is None:
                items.append(self._replace_damaged(row, spool_id))
            else:
                items.append(_item(row, spool_id, payload))
        return items

    def _read(self, row: Row) -> tuple[bytes, bytes | None]:
        """`(spool_id, payload)`; the payload is None when the row is not what was written."""
        try:
            return self._db.rows.item(row)
        except Damaged:
            return self._db.spool_id_of(row.key.lineage), None

    def _replace_damaged(self, row: Row, spool_id: bytes) -> SpoolItem:
        """Declares a damaged item's records expired, in its place."""
        count = row.tag.record_count
        payload = self._declare(spool_id, row.key.first_sequence, count, None)
        tag = ItemTag(0, True, count)
        body = spool_id + payload
        change = Change(deletes=[row.key.pack()], puts={row.key.pack(): (tag.pack(), body)})
        state = self._db.state
        self._db.commit_with_ballast(change, replace(state, expired_records=state.expired_records + count))
        new = Row(row.key, tag, len(body) + _SEAL_BYTES)
        self._db.index.drop(row)
        self._db.index.add(new)
        self._db.emit(DAMAGED, count=count, spool_id=spool_id.hex(), first_sequence=row.key.first_sequence)
        return _item(new, spool_id, payload)

    def _settle(self, spool_id: bytes, runs: list[tuple[int, int]]) -> int:
        lineage = self._db.lineage_of(spool_id)
        if lineage is None:
            return 0
        pending = self._db.index.runs(lineage)
        removed = [run for start, stop in runs for run in list(pending.intersection(start, stop))]
        removed = IntervalSet(removed).runs()
        for start, stop in removed:
            pending.remove(start, stop)
        try:
            done = [row for row in self._overlapping(lineage, removed) if not self._is_pending(pending, row)]
            if done:
                self._db.commit_with_ballast(Change(deletes=[row.key.pack() for row in done]), self._db.state)
        except BaseException:
            for start, stop in removed:
                pending.add(start, stop)
            raise
        for row in done:
            self._db.index.drop(row)
            self._pinned.discard(row.key.pack())
        if done:
            self._db.restore_ballast()
        return sum(stop - start for start, stop in removed)

    def _overlapping(self, lineage: int, runs: Iterable[tuple[int, int]]) -> Iterator[Row]:
        """Items of a lineage that share a sequence with the runs, each once."""
        rows = self._db.rows
        seen: set[int] = set()
        for priority in self._db.index.priorities():
            lowest = ItemKey(priority, lineage, 0).pack()
            for start, stop in runs:
                before = rows.last_at_or_before(lowest, lowest + start)
                reached = before is not None and before.stop_sequence > start
                first = before.key.pack() if before is not None and reached else lowest + start
                for row in rows.scan(first, lowest + stop - 1):
                    if row.key.pack() not in seen:
                        seen.add(row.key.pack())
                        yield row

    @staticmethod
    def _is_pending(pending: IntervalSet, row: Row) -> bool:
        return next(pending.intersection(row.key.first_sequence, row.stop_sequence), None) is not None

    def _oldest_time_us(self) -> int:
        """Event time of the oldest item, by the first of each priority."""
        first = [row for priority in self._db.index.priorities() for row in self._db.scan_priority(priority, 1)]
        return min((row.tag.oldest_time_ms for row in first if row.tag.oldest_time_ms), default=0) * 1000


def _item(row: Row, spool_id: bytes, payload: bytes) -> SpoolItem:
    return SpoolItem(
        key=row.key.pack(),
        spool_id=spool_id,
        first_sequence=row.key.first_sequence,
        record_count=row.tag.record_count,
        priority=row.key.priority,
        receipt=row.tag.receipt,
        payload=payload,
    )
