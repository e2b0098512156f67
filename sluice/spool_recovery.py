"""What a damaged spool still holds. Reads only; `sluice.spool` builds the fresh database from it.

Two kinds of damage do not announce themselves and are looked for:
  * a write-ahead log that breaks off early: SQLite ignores everything behind the first frame whose checksum is wrong,
    commits that were acknowledged included, and opens an older state in which sequences would be allocated again;
  * an index that lost entries: the row is there, and no query finds it. The state's `pending` runs tell.

Salvage walks the table by row id, past what cannot be read, and believes only what a CRC vouches for.
"""

import contextlib
import sqlite3
import struct
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from sluice.errors import Retryable
from sluice.intervals import IntervalSet
from sluice.record import SPOOL_ID_BYTES
from sluice.spool_disk import CURSOR_PREFIX, STATE_KEY, ItemKey, ItemTag, Row, State, open_value, row_of
from sluice.spool_errors import DATABASE, Damaged

# https://www.sqlite.org/fileformat2.html#walformat
_WAL_MAGIC: Final = 0x377F0682
_WAL_HEADER: Final = struct.Struct(">IIIIIIII")
_FRAME_HEADER: Final = struct.Struct(">IIIIII")
# Row ids that are looked up one by one between two readable ends of a broken table.
_LOOKUPS_MAX: Final = 2_000_000


class SalvagedItem(NamedTuple):
    """An item that its CRC vouches for; its payload is read when it is copied."""

    row: Row
    row_id: int
    spool_id: bytes


@dataclass(slots=True)
class Salvage:
    """What was found.

    Attributes:
        items: in the order of sending; they overlap nowhere.
        claimed: keys and tags of item rows that no CRC vouches for.
        state: None when it cannot be trusted: sequences may have been allocated that it does not know of.
        cursors: the sources' places that are what was written.
    """

    items: list[SalvagedItem] = field(default_factory=list)
    claimed: list[Row] = field(default_factory=list)
    state: State | None = None
    cursors: dict[str, bytes] = field(default_factory=dict)


def wal_broken(database: Path) -> bool:
    """Whether the write-ahead log holds a commit that SQLite would not see.

    A crash cannot look like that: frames are written in order, and the commit frame last.
    """
    try:
        data = database.with_name(database.name + "-wal").read_bytes()
    except FileNotFoundError:
        return False
    if not data:
        return False
    if len(data) < _WAL_HEADER.size:
        return True
    magic, _, page_bytes, _, salt1, salt2, sum1, sum2 = _WAL_HEADER.unpack_from(data)
    order = ">" if magic & 1 else "<"
    if magic & ~1 != _WAL_MAGIC or _checksum(data[:24], order, 0, 0) != (sum1, sum2) or not 512 <= page_bytes <= 65536:
        return True
    step = _FRAME_HEADER.size + page_bytes
    sums = (sum1, sum2)
    intact = True
    for at in range(_WAL_HEADER.size, len(data) - step + 1, step):
        _, commit_pages, frame_salt1, frame_salt2, *stated = _FRAME_HEADER.unpack_from(data, at)
        if intact:
            sums = _checksum(data[at : at + 8], order, *sums)
            sums = _checksum(data[at + _FRAME_HEADER.size : at + step], order, *sums)
            intact = (frame_salt1, frame_salt2) == (salt1, salt2) and tuple(stated) == sums
        # One salt may itself be what was hit; frames of an earlier generation differ in both.
        if not intact and commit_pages and (frame_salt1 == salt1 or frame_salt2 == salt2):
            return True
    return False


def _checksum(data: bytes, order: str, s0: int, s1: int) -> tuple[int, int]:
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for a, b in zip(words[::2], words[1::2], strict=True):
        s0 = (s0 + a + s1) & 0xFFFFFFFF
        s1 = (s1 + b + s0) & 0xFFFFFFFF
    return s0, s1


def open_read_only(directory: Path) -> sqlite3.Connection:
    """A connection that writes nothing to the tables.

    Raises:
        Retryable: there is no database.
    """
    file = directory / DATABASE
    if not file.is_file():
        raise Retryable(f"{directory}: no spool here ({file} does not exist)")
    return sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=5)


def salvage(directory: Path) -> Salvage:
    """Everything in `directory`'s database that a CRC vouches for; never raises for damage."""
    found = Salvage()
    trusted = not wal_broken(directory / DATABASE)
    with contextlib.suppress(sqlite3.Error, Retryable, OSError):
        connection = open_read_only(directory)
        connection.text_factory = bytes
        with contextlib.closing(connection):
            _salvage(connection, found)
    if not trusted:
        found.state = None
    _drop_overlaps(found)
    return found


def read_payload(connection: sqlite3.Connection, item: SalvagedItem) -> bytes:
    """The payload of a salvaged item.

    Raises:
        Damaged: when it cannot be read any more.
    """
    row = _row(connection, item.row_id)
    body = None if row is None else _item_body(row)
    if body is None:
        raise Damaged(f"item {item.row.key.first_sequence} cannot be read")
    return body[1][SPOOL_ID_BYTES:]


def _salvage(connection: sqlite3.Connection, found: Salvage) -> None:
    for row_id in _row_ids(connection):
        row = _row(connection, row_id)
        if row is None:
            continue
        if isinstance(row[0], bytes):
            _take_named(row, found)
            continue
        body = _item_body(row)
        if body is not None:
            found.items.append(SalvagedItem(body[0], row_id, body[1][:SPOOL_ID_BYTES]))
            continue
        with contextlib.suppress(Damaged):
            found.claimed.append(row_of(row[0], row[1], 0))


def _row_ids(connection: sqlite3.Connection) -> Iterator[int]:
    """Ids of rows that may exist: upwards to the first unreadable page, downwards to the last, and all between."""
    low = yield from _walk(connection, "SELECT rowid FROM Cache WHERE rowid > ? ORDER BY rowid LIMIT 1", 0)
    if low is None:
        return
    above: list[int] = []
    walk = _walk(connection, "SELECT rowid FROM Cache WHERE rowid < ? ORDER BY rowid DESC LIMIT 1", 2**63 - 1)
    for row_id in walk:
        if row_id <= low:
            break
        above.append(row_id)
    high = min(above, default=_index_max(connection) + 1)
    yield from range(low + 1, min(high, low + 1 + _LOOKUPS_MAX))
    yield from reversed(above)


def _walk(connection: sqlite3.Connection, query: str, at: int) -> Generator[int, None, int | None]:
    """Follows `query` from `at`; returns None at the end, and the last id reached when a page cannot be read."""
    while True:
        try:
            found = connection.execute(query, (at,)).fetchone()
        except sqlite3.DatabaseError:
            return at
        if found is None or not isinstance(found[0], int):
            return None
        at = found[0]
        yield at


def _index_max(connection: sqlite3.Connection) -> int:
    """The highest row id that the index knows, or 0."""
    try:
        found = connection.execute("SELECT max(rowid) FROM Cache INDEXED BY Cache_key_raw").fetchone()
    except sqlite3.DatabaseError:
        return 0
    return found[0] if found and isinstance(found[0], int) else 0


def _row(connection: sqlite3.Connection, row_id: int) -> tuple[Any, Any, Any] | None:
    try:
        found = connection.execute("SELECT key, tag, value FROM Cache WHERE rowid = ?", (row_id,)).fetchone()
    except (sqlite3.Error, UnicodeDecodeError, OverflowError):
        return None
    return None if found is None else (found[0], found[1], found[2])


def _item_body(row: tuple[Any, Any, Any]) -> tuple[Row, bytes] | None:
    key, tag, value = row
    try:
        sealed = Row(ItemKey.unpack(key), ItemTag.unpack(tag), len(value))
        body = open_value(key, tag, value)
    except (Damaged, TypeError):
        return None
    return (sealed, body) if len(body) >= SPOOL_ID_BYTES else None


def _take_named(row: tuple[Any, Any, Any], found: Salvage) -> None:
    with contextlib.suppress(Damaged, UnicodeDecodeError, msgspec.DecodeError):
        key = row[0].decode()
        body = open_value(key, 0, row[2])
        if key == STATE_KEY:
            found.state = msgspec.msgpack.decode(body, type=State)
        elif key.startswith(CURSOR_PREFIX):
            found.cursors[key.removeprefix(CURSOR_PREFIX)] = body


def _drop_overlaps(found: Salvage) -> None:
    """Keeps one item per position, and of the claims only those that contradict nothing."""
    taken: dict[int, IntervalSet] = {}

    def claim(row: Row) -> bool:
        runs = taken.setdefault(row.key.lineage, IntervalSet())
        if next(runs.intersection(row.key.first_sequence, row.stop_sequence), None) is not None:
            return False
        runs.add(row.key.first_sequence, row.stop_sequence)
        return True

    found.items = [item for item in sorted(found.items, key=lambda i: i.row.key.pack()) if claim(item.row)]
    found.claimed = [row for row in sorted(found.claimed, key=lambda r: r.key.pack()) if claim(row)]
