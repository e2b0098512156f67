"""A spool as a stranger sees it: read-only, beside the running writer or after a crash; it repairs nothing."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from sluice.errors import Permanent, Retryable
from sluice.spool_disk import CURSOR_PREFIX, Rows, open_value
from sluice.spool_errors import DATABASE, Damaged
from sluice.spool_index import index_rows
from sluice.spool_recovery import open_read_only, wal_broken

_INTEGRITY_LINES_MAX = 20


class SpoolReader:
    """Reads a spool's directory.

    Args:
        directory: as configured in `spool.directory`.

    Raises:
        Retryable: there is no spool.
    """

    def __init__(self, directory: Path) -> None:
        self._database = directory / "db"
        self._connection = open_read_only(self._database)
        self._rows = Rows(self._connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._connection.close()

    def summary(self) -> dict[str, Any]:
        """Identity, depth and places.

        Raises:
            Permanent: the spool is damaged; `problems` tells where.
        """
        try:
            state = self._rows.state()
            index = index_rows(self._rows.scan(), state, len(state.pending) + 1)
            cursors = {name: self._cursor(name) for name in self._rows.cursor_names()}
        except (Damaged, sqlite3.Error) as error:
            raise Permanent(f"{self._database}: damaged: {error} (see `sluice spool verify`)") from error
        return {
            "owner": state.owner,
            "spool_id": state.spool_id.hex(),
            "next_sequence": state.next_sequence,
            "records": index.record_count(),
            "items": index.item_count(),
            "bytes": index.bytes,
            "expired_records": state.expired_records,
            "earlier_spool_ids": [spool_id.hex() for spool_id in state.lineages.values()],
            "pending": index.runs(state.lineage).runs()[:64],
            "cursors": cursors,
        }

    def problems(self) -> Iterator[str]:
        """Everything that is not as it was written; nothing when all is well."""
        if wal_broken(self._database / DATABASE):
            yield "the write-ahead log breaks off before its last commit"
        try:
            query = f"PRAGMA integrity_check({_INTEGRITY_LINES_MAX})"
            yield from (line for (line,) in self._connection.execute(query) if line != "ok")
            self.summary()
            for name in self._rows.cursor_names():
                self._cursor(name)
            for row in self._rows.scan():
                try:
                    self._rows.item(row)
                except Damaged as error:
                    yield str(error)
        except (Permanent, sqlite3.Error) as error:
            yield str(error)

    def payloads(self) -> Iterator[bytes]:
        """Payloads of intact items, in the order of sending; damaged ones are left out."""
        for row in self._rows.scan():
            try:
                yield self._rows.item(row)[1]
            except Damaged:
                continue

    def _cursor(self, name: str) -> str:
        found = self._rows.value(CURSOR_PREFIX + name)
        if found is None:
            raise Retryable(f"cursor {name!r} was deleted while it was read")
        return open_value(CURSOR_PREFIX + name, 0, found[1]).decode(errors="replace")
