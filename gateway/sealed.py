"""The sealed store: records that may not leave the site, encrypted, bounded, readable on the site only.

Layout of `local.directory` (mode 0700):

    store.json      format and id of the key
    lock            held by the one writer
    records/        what stayed (`sealed_schema.RECORDS`)
    results/        what the engine says of it (`sealed_schema.RESULTS`)
    analysis.json, published.json   how far analysis and its publishing got (`analysis`)

Invariants:
  * `write` returns if and only if the records are durable.
  * At most `bytes_max` bytes; beyond it writes raise `Backpressure` and nothing is lost, here or there.
  * A record that was written twice (a resend after a restart) is read once: `read_records` goes by identity.
  * Deletion is by age only, and is counted.
"""

import asyncio
import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from gateway.batches import LocalBatch
from gateway.local_config import LocalConfig
from gateway.sealed_files import SealedFile, expired, plan_merge
from gateway.sealed_key import SealedKey, check_identity, load_key
from gateway.sealed_schema import RECORDS, RESULTS, record_rows
from gateway.sealed_table import SealedTable, saved_position, write_durably
from gateway.sealed_writer import GroupCommit
from sluice.errors import Backpressure, ConfigError, Permanent, SluiceError
from sluice.intervals import IntervalSet
from sluice.telemetry import Event, Telemetry

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT: Final = 1
# Where the followers of the tables keep their places.
PLACES: Final = ("analysis.json", "published.json")
_DAY_MS: Final = 86_400_000

KEY_MADE = Event(
    name="sealed_key_made",
    unit="keys",
    help="Keys made because local.key_create is set. Without the key the store is unreadable: back it up.",
    level="warning",
)
FULL = Event(
    name="sealed_store_full",
    unit="times",
    help="Times that the sealed store became full; the gateway stops acknowledging until there is room.",
    level="error",
)
ROOM = Event(name="sealed_store_room", unit="times", help="Times that a full sealed store had room again.")
EXPIRED = Event(
    name="sealed_rows_expired",
    unit="rows",
    help="Rows deleted by local.retention_days.",
    labels=("table",),
    level="warning",
)
MAINTENANCE_FAILED = Event(
    name="sealed_maintenance_failed",
    unit="times",
    help="Failed attempts to merge or expire sealed files; tried again later.",
    level="error",
)


def key_path(config: LocalConfig) -> Path:
    """Where the key is."""
    return Path(config.key_file) if config.key_file else Path(config.directory).absolute().parent / "sealed.key"


class SealedReader:
    """Reads a store, also while a gateway writes it.

    Raises:
        ConfigError: there is no store, or the key is not its key.
    """

    def __init__(self, config: LocalConfig) -> None:
        directory = Path(config.directory)
        identity = _read_identity(directory)
        if identity is None:
            raise ConfigError(f"no sealed store in {directory}: set local.directory to the gateway's")
        key, _ = load_key(key_path(config))
        check_identity(directory, key, identity)
        self.records, self.results = _tables(config, key)

    def read_records(self, columns: Sequence[str] | None = None, since_ms: int = 0) -> "Iterator[pa.Table]":
        """Sealed records, each identity once, in tables of one file each."""
        return _distinct(self.records, columns, since_ms)

    def read_results(self, columns: Sequence[str] | None = None, since_ms: int = 0) -> "Iterator[pa.Table]":
        """Results, each identity once."""
        return _distinct(self.results, columns, since_ms)


class SealedStore:
    """The one writer of a store, as a service: `run` merges and expires.

    Args:
        config: limits and places.
        telemetry: for its events and gauges.
        clock_ms: Unix time in milliseconds.

    Raises:
        ConfigError: the key is missing or wrong, or another process writes this store.
    """

    def __init__(
        self,
        config: LocalConfig,
        telemetry: Telemetry,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self.config = config
        self.directory = Path(config.directory)
        self._telemetry = telemetry
        self._clock_ms = clock_ms
        key, made = load_key(key_path(config), create=config.key_create)
        if made:
            telemetry.emit(KEY_MADE, file=str(key_path(config)))
        self._lock = _open_directory(self.directory, key)
        self.records, self.results = _tables(config, key)
        files = [*self.records.open_for_writing(), *self.results.open_for_writing()]
        self._bytes = sum(file.size_bytes for file in files)
        places = [saved_position(self.directory / name) for name in PLACES]
        # Never below what a follower has seen, even if all files have expired and the clock was set back.
        self._last_commit = max([-1, *(file.last for file in files), *places])
        self._was_full = False
        self._damaged: set[str] = set()
        self._stopping = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sealed-commit")
        self._records = GroupCommit[LocalBatch](self._commit_records, **_limits(config))
        self._results = GroupCommit[Mapping[str, Sequence[Any]]](self._commit_results, **_limits(config))
        self._on_commit: list[Callable[[], None]] = []
        gauge = telemetry.gauge("sealed_store_bytes", "Size of the sealed store in bytes.")
        gauge.set_function(lambda: float(self._bytes))
        telemetry.gauge("sealed_store_max_bytes", "Limit of its size in bytes.").set(config.bytes_max)

    @property
    def name(self) -> str:
        """See `Service`."""
        return "sealed-store"

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        return self._bytes

    @property
    def full(self) -> bool:
        """Whether writes are refused now."""
        return self._bytes + self._records.pending_bytes >= self.config.bytes_max

    def on_commit(self, notify: Callable[[], None]) -> None:
        """Calls `notify` on the event loop after each commit."""
        self._on_commit.append(notify)

    async def write(self, batch: LocalBatch) -> None:
        """Returns if and only if the records are durable.

        Raises:
            Backpressure: the store (or its disk) is full, or too much waits for its commit.
            Retryable: the disk failed, or the store is closed.
        """
        self._check_room(batch.size_bytes)
        await self._records.write(batch, batch.size_bytes)

    async def write_results(self, rows: Mapping[str, Sequence[Any]]) -> None:
        """Makes results durable: lists by column of `RESULTS`, all but `commit`. Raises as `write`."""
        size_bytes = 256 * len(rows["sequence"])
        self._check_room(size_bytes)
        await self._results.write(rows, size_bytes)

    async def run(self) -> None:
        """Merges and expires until drained."""
        while not self._stopping.is_set():
            await self.maintain()
            try:
                async with asyncio.timeout(self.config.maintenance_interval_s):
                    await self._stopping.wait()
            except TimeoutError:
                continue

    async def maintain(self) -> None:
        """Expires what is too old and merges what is small, once."""
        for label, table in (("records", self.records), ("results", self.results)):
            try:
                await self._maintain(label, table)
            except SluiceError as error:  # one table's trouble is not the other's
                self._telemetry.emit(MAINTENANCE_FAILED, detail=str(error))
        self._note_room()

    async def drain(self, deadline_s: float) -> None:
        """Commits what waits and closes. Idempotent."""
        self._stopping.set()
        await self._records.close()
        await self._results.close()
        self._thread.shutdown(wait=False)
        self._lock.close()

    async def _maintain(self, label: str, table: SealedTable) -> None:
        old = await asyncio.to_thread(self._expire, table)
        self._bytes -= sum(file.size_bytes for file in old)
        if old:
            self._telemetry.emit(EXPIRED, sum(file.rows for file in old), table=label)
        while not self._stopping.is_set():
            grown_bytes = await asyncio.to_thread(self._merge, table)
            if grown_bytes is None:
                return
            self._bytes += grown_bytes

    def _check_room(self, size_bytes: int) -> None:
        used = self._bytes + self._records.pending_bytes + size_bytes
        if used <= self.config.bytes_max:
            return
        if not self._was_full:
            self._was_full = True
            self._telemetry.emit(FULL, size_bytes=self._bytes, bytes_max=self.config.bytes_max)
        raise Backpressure(
            f"sealed store {self.directory} is full: {self._bytes} bytes, local.bytes_max is {self.config.bytes_max}",
            retry_after_s=self.config.retry_after_s,
        )

    def _note_room(self) -> None:
        if self._was_full and not self.full:
            self._was_full = False
            self._telemetry.emit(ROOM, size_bytes=self._bytes)

    async def _commit_records(self, batches: Sequence[LocalBatch]) -> None:
        await self._commit(self.records, lambda: record_rows(batches))

    async def _commit_results(self, groups: Sequence[Mapping[str, Sequence[Any]]]) -> None:
        await self._commit(self.results, lambda: {n: [v for g in groups for v in g[n]] for n in groups[0]})

    async def _commit(self, table: SealedTable, rows: Callable[[], Mapping[str, Sequence[Any]]]) -> None:
        # By the clock, so that numbers grow even after all files have expired.
        now_ms = self._clock_ms()
        number = self._last_commit = max(self._last_commit + 1, now_ms)

        def work() -> int:
            return table.commit(table.columns.table(rows(), number), number, now_ms).size_bytes

        size_bytes = await asyncio.get_running_loop().run_in_executor(self._thread, work)
        # Not `+= await`: that would read the sum before it waits, and lose what others add meanwhile.
        self._bytes += size_bytes
        for notify in self._on_commit:
            notify()

    def _expire(self, table: SealedTable) -> "Sequence[SealedFile]":
        """Deletes what is too old; returns it. In a thread, as `_merge`: the sum of bytes is the event loop's."""
        before_ms = self._clock_ms() - int(self.config.retention_days * _DAY_MS)
        old = expired(table.files(), before_ms)
        table.delete(old)
        return old

    def _merge(self, table: SealedTable) -> int | None:
        """Merges once; returns by how many bytes the table grew, None when there was nothing to merge."""
        config = self.config
        limits = {"merge_files": config.merge_files, "rotate_bytes": config.rotate_bytes}
        # One that is damaged counts as finished: it stays as it is, and those on either side are merged without it.
        known = [
            replace(file, size_bytes=config.rotate_bytes) if file.name in self._damaged else file
            for file in table.files()
        ]
        files = plan_merge(known, **limits, rotate_ms=int(config.rotate_s * 1000))
        if not files:
            return None
        try:
            made = table.merge(files)
        except Permanent:
            self._damaged.update(file.name for file in files if not table.readable(file))
            raise
        return made.size_bytes - sum(file.size_bytes for file in files)


def _limits(config: LocalConfig) -> dict[str, Any]:
    return {
        "delay_s": config.commit_delay_s,
        "commit_bytes_max": config.commit_bytes_max,
        "pending_bytes_max": config.pending_bytes_max,
    }


def _tables(config: LocalConfig, key: SealedKey) -> tuple[SealedTable, SealedTable]:
    directory = Path(config.directory)
    return (
        SealedTable(directory / "records", RECORDS, key, config.retry_after_s),
        SealedTable(directory / "results", RESULTS, key, config.retry_after_s),
    )


def _read_identity(directory: Path) -> Mapping[str, Any] | None:
    path = directory / "store.json"
    try:
        identity: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"sealed store: {path} cannot be read: {error}") from error
    if identity.get("format") != FORMAT:
        raise ConfigError(f"sealed store: {path} has format {identity.get('format')}, this version knows {FORMAT}")
    return identity


def _open_directory(directory: Path, key: SealedKey) -> IO[str]:
    """Makes the directory and takes its lock."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (directory / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"local.directory: cannot use {directory}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise ConfigError(f"sealed store {directory} is in use by another process") from error
    try:
        identity = _read_identity(directory)
        check_identity(directory, key, identity)
    except ConfigError:
        lock.close()
        raise
    if identity is None:
        write_durably(directory / "store.json", json.dumps({"format": FORMAT, "key_id": key.id}))
    return lock


def _distinct(table: SealedTable, columns: Sequence[str] | None, since_ms: int) -> "Iterator[pa.Table]":
    import pyarrow as pa

    needed = {"device_id", "spool_id", "sequence"}
    wanted = [*dict.fromkeys([*columns, *sorted(needed)])] if columns else None
    seen: dict[tuple[str, str], IntervalSet] = {}
    for _file, rows in table.scan(columns=wanted, since_ms=since_ms):
        keys = zip(*(rows.column(name).to_pylist() for name in ("device_id", "spool_id", "sequence")), strict=True)
        kept = [
            i
            for i, (device, spool, sequence) in enumerate(keys)
            if seen.setdefault((device, spool), IntervalSet()).add(sequence, sequence + 1)
        ]
        yield rows if len(kept) == rows.num_rows else rows.take(pa.array(kept, pa.int64()))
