"""The spool's open database: its life, its recovery, and every write to it. `sluice.spool` decides what is written.

Invariant: `state` and `index` describe the committed rows; after a commit that failed they are as before it.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from msgspec import Meta
from msgspec.structs import replace

from sluice.config import Section
from sluice.errors import Permanent, Retryable
from sluice.spool_disk import LINEAGE_MAX, SEQUENCE_MAX, Change, ItemCache, ItemKey, Row, Rows, State
from sluice.spool_errors import DATABASE, Damaged, DiskFull, translated
from sluice.spool_files import SpoolDirectory
from sluice.spool_index import SpoolIndex, head_runs, index_rows
from sluice.spool_rebuild import Declare, RecoveryReport, make_empty, rebuild
from sluice.spool_recovery import wal_broken
from sluice.telemetry import Event, Telemetry

CREATED = Event(name="spool_created", unit="spools", help="Spools made.")
RECOVERED = Event(
    name="spool_recovered", unit="spools", help="Damaged spools that were rebuilt from what is intact.", level="error"
)
DAMAGED = Event(
    name="spool_damaged", unit="records", help="Records lost to damage, declared as expired.", level="error"
)
EXPIRED = Event(
    name="spool_expired", unit="records", help="Records dropped because the spool was full.", level="warning"
)
DISK_FULL = Event(name="spool_disk_full", unit="transactions", help="Writes that met a full disk.", level="error")
BALLAST_RELEASED = Event(
    name="spool_ballast_released", unit="ballasts", help="Ballasts given back to a full disk.", level="warning"
)

MIB: Final = 1024 * 1024
_T = TypeVar("_T")


class SpoolConfig(Section, frozen=True, kw_only=True):
    """Where the spool is, and its limits."""

    directory: Annotated[str, Meta(min_length=1, description="Its directory; mode 0700, one writer.")] = "spool"
    bytes_max: Annotated[int, Meta(ge=MIB, description="Size of the items, with their overhead.")] = 1024 * MIB
    items_max: Annotated[int, Meta(ge=16, description="Number of items (batches); bounds the memory.")] = 250_000
    when_full: Annotated[
        Literal["block", "drop_oldest"],
        Meta(description="block: producers wait. drop_oldest: lowest priority first, declared as expired."),
    ] = "block"
    ballast_bytes: Annotated[int, Meta(ge=0, description="Given back when the disk is full; 0 for none.")] = 6 * MIB
    pending_runs_max: Annotated[int, Meta(ge=1, description="Unsettled runs kept exactly for a recovery.")] = 256


class SpoolDatabase:
    """See the module's docstring. Not thread-safe: `sluice.spool` holds the lock.

    Args: as of `sluice.spool.Spool`.

    Raises:
        ConfigError: another process has the directory, or it cannot be used.
        Permanent: the spool belongs to another owner.
    """

    cache: ItemCache
    state: State
    index: SpoolIndex

    def __init__(
        self, config: SpoolConfig, owner: str, declare: Declare, telemetry: Telemetry | None, item_records_max: int
    ) -> None:
        self._config = config
        self._owner = owner
        self._declare = declare
        self._telemetry = telemetry
        self._item_records_max = item_records_max
        self._damaged = False
        self.directory = SpoolDirectory(Path(config.directory), config.ballast_bytes)
        self.directory.claim()
        try:
            self._open()
        except BaseException:
            self.directory.release()
            raise

    @property
    def rows(self) -> Rows:
        """Reads over this thread's connection."""
        return self.cache.rows

    def guarded(self, work: Callable[[], _T]) -> _T:
        """Runs `work`; when the database turns out to be damaged it is rebuilt, and `work` runs again."""
        if self._damaged:
            reason = "an earlier recovery failed"
        else:
            try:
                with translated(self.directory.database):
                    return work()
            except Damaged as error:
                reason = str(error)
        self.cache.close()
        self._recover(reason)
        self._load()
        return work()

    def commit(self, change: Change, state: State) -> None:
        """Writes all of it, or nothing. The state's `pending` is taken from the index.

        Raises:
            DiskFull, Damaged, Retryable: nothing was written.
        """
        pending = self.index.runs(state.lineage)
        runs = head_runs(pending, self._config.pending_runs_max, state.next_sequence)
        state = replace(state, pending=runs)
        try:
            self.cache.commit(change, state)
        except DiskFull:
            self.emit(DISK_FULL, directory=str(self.directory.path))
            raise
        self.state = state

    def commit_with_ballast(self, change: Change, state: State) -> None:
        """Commits what will free space in the end: gives the ballast back when the disk is full."""
        try:
            self.commit(change, state)
        except DiskFull:
            self._release_ballast()
            self.commit(change, state)

    def restore_ballast(self) -> None:
        """Makes the ballast again after a full disk; an empty database gives its space back for that."""
        if self.directory.has_ballast or self.directory.make_ballast() or self.index.item_count():
            return
        with contextlib.suppress(DiskFull, Retryable):
            self.cache.shrink()
            self.directory.make_ballast()

    def scan_priority(self, priority: int, count_max: int = -1) -> Iterator[Row]:
        """Items of one priority, the oldest first."""
        start = ItemKey(priority, 0, 0).pack()
        stop = ItemKey(priority, LINEAGE_MAX, SEQUENCE_MAX).pack()
        return self.rows.scan(start, stop, count_max)

    def spool_id_of(self, lineage: int) -> bytes:
        """The spool_id of a lineage that has items."""
        return self.state.spool_id if lineage == self.state.lineage else self.state.lineages[lineage]

    def lineage_of(self, spool_id: bytes) -> int | None:
        """The lineage of a spool_id, or None when it is not one of ours."""
        if spool_id == self.state.spool_id:
            return self.state.lineage
        return next((n for n, known in self.state.lineages.items() if known == spool_id), None)

    def emit(self, event: Event, count: int = 1, **fields: Any) -> None:
        """Emits an event, when there is telemetry."""
        if self._telemetry:
            self._telemetry.emit(event, count, **fields)

    def close(self) -> None:
        """Closes it; a second close does nothing."""
        if self.directory.claimed:
            # Each thread has a connection of its own, so the last one to close would be long in coming.
            with contextlib.suppress(Retryable, Permanent):
                self.cache.checkpoint()
        self.cache.close()
        self.directory.release()

    def _open(self) -> None:
        directory = self.directory
        fresh = False
        if directory.interrupted_recovery():
            self._recover("a recovery was interrupted")
        elif not directory.database.exists():
            make_empty(directory, self._owner)
            fresh = True
        elif wal_broken(directory.database / DATABASE):
            self._recover("the write-ahead log breaks off before its last commit")
        try:
            self._load()
        except DiskFull:
            self._release_ballast()
            self._load()
        except Damaged as error:
            self._recover(str(error))
            self._load()
        if self.state.owner != self._owner:
            self.cache.close()
            raise Permanent(
                f"spool {directory.path} belongs to {self.state.owner!r}, not to {self._owner!r}: "
                "drain it under that name, or set another spool.directory"
            )
        directory.make_ballast()
        if fresh:
            self.emit(CREATED, spool_id=self.state.spool_id.hex(), directory=str(directory.path))

    def _load(self) -> None:
        """Opens the database and counts what is in it."""
        self.cache = ItemCache(self.directory.database)
        try:
            with translated(self.directory.database):
                self.state = self.rows.state()
                self.index = index_rows(self.rows.scan(), self.state, self._config.pending_runs_max)
        except BaseException:
            self.cache.close()
            raise

    def _recover(self, reason: str) -> None:
        """Replaces the database by one of what is intact, and says exactly what is lost."""
        self._damaged = True
        self.directory.set_damaged_aside()
        try:
            report = self._rebuild()
        except DiskFull:
            self._release_ballast()
            report = self._rebuild()
        self._damaged = False
        self.emit(RECOVERED, reason=reason, **report.fields())
        if report.lost_records:
            self.emit(DAMAGED, count=report.lost_records)

    def _rebuild(self) -> RecoveryReport:
        runs_max = self._config.pending_runs_max
        return rebuild(self.directory, self._owner, self._declare, self._item_records_max, runs_max)

    def _release_ballast(self) -> None:
        if self.directory.release_ballast():
            self.emit(BALLAST_RELEASED, directory=str(self.directory.path))
