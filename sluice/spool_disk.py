"""The spool's rows on diskcache: their format, and the only SQL that the spool runs itself.

A row is `(key, tag, value)` of diskcache's table:

    item    key    = rank << 58 | lineage << 50 | first sequence, so that the order of keys is the order of sending
            tag    = oldest event time (milliseconds) << 21 | receipt flag << 20 | record count
            value  = crc32c (4 bytes, little endian) | spool_id (16 bytes) | payload
    state   key    = "state"; value = crc32c | MessagePack of `State`
    cursor  key    = "cursor:" + name; value = crc32c | the source's bytes

The CRC covers key, tag and all of the value behind it, so a row that answers to a wrong key is found out as well.

What differs from diskcache's defaults, each of which loses data (measured: after a power cut 0 of 8,151 were left):
values stay in the database file, every commit is synced, nothing is evicted, and only bytes are stored: a planted
pickle is refused, not loaded (CVE-2025-69872). Page cache and memory map are small: the agent has 60 MB.

Errors are those of `spool_errors`; the transaction is rolled back first, since diskcache leaves it open when the COMMIT
itself fails.
"""

import contextlib
import sqlite3
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import diskcache
import google_crc32c
import msgspec

from sluice.record import SPOOL_ID_BYTES
from sluice.spool_errors import DATABASE, Damaged, translated

STATE_KEY: Final = "state"
CURSOR_PREFIX: Final = "cursor:"
PRIORITY_MAX: Final = 9
LINEAGE_MAX: Final = 255
# 2**50 sequences are 35 years at a million records a second.
SEQUENCE_MAX: Final = 2**50 - 1
ITEM_RECORDS_MAX: Final = 2**20 - 1
# What SQLite and diskcache add to an item (row, two indexes), rounded up; measured 180 to 300 bytes.
ITEM_OVERHEAD_BYTES: Final = 512
_KEY_MAX: Final = 2**62 - 1
_TIME_MS_MAX: Final = 2**42 - 1
_RECEIPT_BIT: Final = 1 << 20
_MODE_RAW: Final = diskcache.core.MODE_RAW
_SETTINGS: Final[Mapping[str, Any]] = {
    "cull_limit": 0,
    "disk_min_file_size": 2**31,
    "eviction_policy": "none",
    "size_limit": 2**62,
    # Incremental: only `shrink` gives pages back.
    "sqlite_auto_vacuum": 2,
    "sqlite_cache_size": -1024,
    "sqlite_journal_mode": "wal",
    "sqlite_journal_size_limit": 8 * 1024 * 1024,
    "sqlite_mmap_size": 0,
    "sqlite_synchronous": 2,
    "statistics": 0,
    "tag_index": 0,
}


class ItemKey(NamedTuple):
    """Where an item stands. Its order (as an integer) is the order of sending.

    Attributes:
        priority: 0 to 9; higher is sent first.
        lineage: number of the spool_id among those that this directory has had.
        first_sequence: first position that the item covers.
    """

    priority: int
    lineage: int
    first_sequence: int

    def pack(self) -> int:
        """The row's key."""
        return (PRIORITY_MAX - self.priority) << 58 | self.lineage << 50 | self.first_sequence

    @classmethod
    def unpack(cls, key: int) -> "ItemKey":
        """The key of a row.

        Raises:
            Damaged: when no item can have it.
        """
        if not isinstance(key, int) or not 0 <= key <= _KEY_MAX or key >> 58 > PRIORITY_MAX:
            raise Damaged(f"row with an impossible key {key!r}")
        return cls(PRIORITY_MAX - (key >> 58), (key >> 50) & LINEAGE_MAX, key & SEQUENCE_MAX)


class ItemTag(NamedTuple):
    """What is known of an item without reading its payload."""

    oldest_time_ms: int
    receipt: bool
    record_count: int

    def pack(self) -> int:
        """The row's tag."""
        time_ms = min(max(self.oldest_time_ms, 0), _TIME_MS_MAX)
        return time_ms << 21 | (_RECEIPT_BIT if self.receipt else 0) | self.record_count

    @classmethod
    def unpack(cls, tag: Any) -> "ItemTag":
        """The tag of a row.

        Raises:
            Damaged: when no item can have it.
        """
        if not isinstance(tag, int) or not 0 <= tag < 2**63 or not tag & ITEM_RECORDS_MAX:
            raise Damaged(f"row with an impossible tag {tag!r}")
        return cls(tag >> 21, bool(tag & _RECEIPT_BIT), tag & ITEM_RECORDS_MAX)


class Row(NamedTuple):
    """An item's row without its payload; `size_bytes` is that of the value."""

    key: ItemKey
    tag: ItemTag
    size_bytes: int

    @property
    def stop_sequence(self) -> int:
        """The first sequence behind the item."""
        return self.key.first_sequence + self.tag.record_count


class State(msgspec.Struct, frozen=True, array_like=True):
    """What must be durable together with every append.

    Attributes:
        owner: whose spool it is (site/device).
        spool_id: of the sequences that are allocated now; `lineage` is its number.
        next_sequence: the lowest sequence not yet allocated.
        expired_records: declared expired so far.
        pending: unsettled runs of the current lineage; the last one is widened when there are too many.
        lineages: the spool_ids of earlier databases that still have items here, by number.
    """

    owner: str
    spool_id: bytes
    lineage: int
    next_sequence: int
    expired_records: int
    pending: tuple[tuple[int, int], ...]
    lineages: dict[int, bytes]


@dataclass(slots=True)
class Change:
    """Rows to write and to delete in one transaction; a cursor of None is deleted."""

    puts: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    deletes: list[int] = field(default_factory=list)
    cursors: dict[str, bytes | None] = field(default_factory=dict)


class BytesDisk(diskcache.Disk):  # type: ignore[misc]
    """Stores bytes under integers and strings, in the database; refuses everything else, in both directions."""

    def put(self, key: Any) -> tuple[Any, bool]:
        """The database key."""
        if type(key) not in {int, str}:
            raise TypeError(f"spool keys are int or str, not {type(key).__name__}")
        return key, True

    def get(self, key: Any, raw: bool) -> Any:
        """The key of a row."""
        if not raw or type(key) not in {int, str}:
            raise Damaged("row with a pickled key refused")
        return key

    def store(self, value: Any, read: bool, key: Any = None) -> tuple[int, int, None, sqlite3.Binary]:
        """The columns `(size, mode, filename, value)`; the size is kept, so that a scan need not read values."""
        if type(value) is not bytes or read:
            raise TypeError(f"spool values are bytes, not {type(value).__name__}")
        return len(value), _MODE_RAW, None, sqlite3.Binary(value)

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> bytes:
        """The value of a row."""
        if mode != _MODE_RAW or filename is not None or type(value) is not bytes or read:
            raise Damaged(f"row of mode {mode!r} refused: the spool holds only bytes")
        return value


class Rows:
    """Reads rows over a connection; `ItemCache` and the read-only tools share it."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def scan(self, start: int = 0, stop: int = _KEY_MAX, count_max: int = -1) -> Iterator[Row]:
        """Items with keys in `[start, stop]`, in the order of sending, without their payloads."""
        query = "SELECT key, tag, size FROM Cache WHERE raw = 1 AND key BETWEEN ? AND ? ORDER BY key LIMIT ?"
        for key, tag, size in self._connection.execute(query, (start, stop, count_max)):
            yield row_of(key, tag, size)

    def last_at_or_before(self, start: int, key: int) -> Row | None:
        """The item with the highest key in `[start, key]`."""
        query = "SELECT key, tag, size FROM Cache WHERE raw = 1 AND key BETWEEN ? AND ? ORDER BY key DESC LIMIT 1"
        found = self._connection.execute(query, (start, key)).fetchone()
        return None if found is None else row_of(*found)

    def value(self, key: int | str) -> tuple[Any, Any] | None:
        """`(tag, value)` of a row, unverified."""
        query = "SELECT tag, value FROM Cache WHERE raw = 1 AND mode = ? AND key = ?"
        found = self._connection.execute(query, (_MODE_RAW, key)).fetchone()
        return None if found is None else (found[0], found[1])

    def cursor_names(self) -> list[str]:
        """Names of the stored cursors."""
        query = "SELECT key FROM Cache WHERE raw = 1 AND key >= ? AND key < ? ORDER BY key"
        found = self._connection.execute(query, (CURSOR_PREFIX, CURSOR_PREFIX[:-1] + ";"))
        return [str(name).removeprefix(CURSOR_PREFIX) for (name,) in found]

    def state(self) -> State:
        """The state.

        Raises:
            Damaged: missing or not what was written.
        """
        found = self.value(STATE_KEY)
        if found is None:
            raise Damaged("the state row is missing")
        try:
            return msgspec.msgpack.decode(open_value(STATE_KEY, 0, found[1]), type=State)
        except msgspec.DecodeError as error:
            raise Damaged(f"the state row cannot be decoded: {error}") from error

    def item(self, row: Row) -> tuple[bytes, bytes]:
        """`(spool_id, payload)` of an item.

        Raises:
            Damaged: when the row is not what was written.
        """
        key = row.key.pack()
        found = self.value(key)
        if found is None:
            raise Damaged(f"item {row.key.first_sequence} cannot be read")
        body = open_value(key, row.tag.pack(), found[1])
        if found[0] != row.tag.pack() or len(body) < SPOOL_ID_BYTES:
            raise Damaged(f"item {row.key.first_sequence} is not what was written")
        return body[:SPOOL_ID_BYTES], body[SPOOL_ID_BYTES:]


class ItemCache(diskcache.Cache):  # type: ignore[misc]
    """diskcache with the settings of a durable spool.

    Args:
        directory: must exist.
    """

    def __init__(self, directory: Path) -> None:
        try:
            with translated(directory):
                super().__init__(str(directory), timeout=5, disk=BytesDisk, **_SETTINGS)
        except (ValueError, KeyError, TypeError, AssertionError, AttributeError, OverflowError) as error:
            # diskcache met a settings table that nobody wrote.
            raise Damaged(f"{directory / DATABASE}: {error!r}") from error

    @property
    def rows(self) -> Rows:
        """Reads over this thread's connection."""
        return Rows(self._con)

    def commit(self, change: Change, state: State) -> None:
        """Writes all of it, or nothing; durable when it returns.

        Raises:
            DiskFull, Damaged, Retryable: nothing was written.
        """
        with translated(Path(self.directory)):
            try:
                with self.transact():
                    for key in change.deletes:
                        self.delete(key)
                    for key, (tag, body) in change.puts.items():
                        self.set(key, seal_value(key, tag, body), tag=tag)
                    self._put_cursors(change.cursors)
                    self.set(STATE_KEY, seal_value(STATE_KEY, 0, msgspec.msgpack.encode(state)))
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    if self._con.in_transaction:
                        self._con.execute("ROLLBACK")
                raise

    def checkpoint(self) -> None:
        """Brings everything from the write-ahead log into the database, and empties the log."""
        with translated(Path(self.directory)):
            self._con.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def shrink(self) -> None:
        """Gives the file system what the database does not use."""
        with translated(Path(self.directory)):
            # `execute` would take one step of it, which is one page.
            self._con.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE)")

    def cursors(self) -> dict[str, bytes]:
        """All cursors that are what was written; a damaged one is left out."""
        cursors = {}
        for name in self.rows.cursor_names():
            found = self.rows.value(CURSOR_PREFIX + name)
            with contextlib.suppress(Damaged):
                if found is not None:
                    cursors[name] = open_value(CURSOR_PREFIX + name, 0, found[1])
        return cursors

    def _put_cursors(self, cursors: Mapping[str, bytes | None]) -> None:
        for name, body in cursors.items():
            key = CURSOR_PREFIX + name
            if body is None:
                self.delete(key)
            else:
                self.set(key, seal_value(key, 0, body))


def row_of(key: Any, tag: Any, size: Any) -> Row:
    """A row as read.

    Raises:
        Damaged: when no item can look like this.
    """
    if not isinstance(size, int) or size < 0:
        raise Damaged(f"row with an impossible size {size!r}")
    return Row(ItemKey.unpack(key), ItemTag.unpack(tag), size)


def seal_value(key: int | str, tag: int, body: bytes) -> bytes:
    """The value to store: the body behind its CRC."""
    return struct.pack("<I", _crc(key, tag, body)) + body


def open_value(key: int | str, tag: int, value: Any) -> bytes:
    """The body of a stored value.

    Raises:
        Damaged: when the CRC does not vouch for it.
    """
    if type(value) is not bytes or len(value) < 4:
        raise Damaged(f"row {key!r} holds no sealed value")
    if struct.unpack_from("<I", value)[0] != _crc(key, tag, value[4:]):
        raise Damaged(f"row {key!r}: crc32c differs")
    return value[4:]


def _crc(key: int | str, tag: int, body: bytes) -> int:
    head = key.encode() if isinstance(key, str) else struct.pack("<qq", key, tag)
    return int(google_crc32c.extend(google_crc32c.value(head), body))
