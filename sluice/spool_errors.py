"""What SQLite's errors mean to the spool: `DiskFull`, `Damaged` or `Retryable`."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import diskcache

from sluice.errors import Permanent, Retryable

DATABASE: Final = diskcache.core.DBNAME
# With less than this an I/O error is taken for a full disk: the log's shared memory alone takes 32 KiB.
_ROOM_BYTES: Final = 256 * 1024
_WITHOUT_ROOM: Final = frozenset({sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN})
_TRANSIENT: Final = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
    }
)


class DiskFull(Retryable):
    """The file system has no room for the transaction; nothing of it was written."""


class Damaged(Permanent):
    """The database, or a row of it, is not what was written."""


@contextlib.contextmanager
def translated(directory: Path) -> Iterator[None]:
    """Turns the errors of SQLite and diskcache into ours."""
    try:
        yield
    except diskcache.Timeout as error:
        raise Retryable(f"{directory / DATABASE}: locked by another process") from error
    except sqlite3.Error as error:
        raise _translate(error, directory / DATABASE) from error


def _translate(error: sqlite3.Error, file: Path) -> Exception:
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    # SQLite reports some writes that found no room as I/O errors.
    if code == sqlite3.SQLITE_FULL or (code in _WITHOUT_ROOM and _free_bytes(file.parent) < _ROOM_BYTES):
        return DiskFull(f"{file}: the disk is full")
    if code in _TRANSIENT:
        return Retryable(f"{file}: {error}")
    return Damaged(f"{file}: {error}")


def _free_bytes(directory: Path) -> int:
    try:
        stat = os.statvfs(directory)
    except OSError:
        return _ROOM_BYTES
    return stat.f_bavail * stat.f_frsize
