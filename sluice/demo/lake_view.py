"""Looks into the lake from outside, with DuckDB over the files that the Delta log names, as a data scientist would.

It shares no code with the writer or with `sluice ledger`, so that their counts and these check each other.
"""

from pathlib import Path
from typing import Any, Final

RECORDS: Final = "records"
RESULTS: Final = "results"
STATUS: Final = "status"
LEDGER: Final = "ledger"
QUARANTINE: Final = "quarantine"
IDENTITY: Final = "device_id, spool_id, sequence"


class LakeView:
    """Counts in the tables of a local lake.

    Args:
        folder: of the lake.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rows(self, table: str, where: str = "true") -> int:
        """Rows of a table for which an SQL condition holds; 0 when there is no such table yet."""
        return int(self._value(table, "count(*)", where))

    def duplicates(self) -> int:
        """Rows of `records` beyond the first for an identity."""
        return int(self._value(RECORDS, f"count(*) - count(distinct ({IDENTITY}))"))

    def query(self, table: str, columns: str, rest: str = "") -> list[tuple[Any, ...]]:
        """Rows of `select COLUMNS from TABLE REST`; none when the table is not there or empty."""
        import duckdb

        files = self._files(table)
        if not files:
            return []
        with duckdb.connect() as connection:
            source = "read_parquet(?, hive_partitioning=true, union_by_name=true)"
            # The SQL is written in this package; only file names come from outside, as a parameter.
            return connection.execute(f"select {columns} from {source} {rest}", [files]).fetchall()  # noqa: S608

    def agents_ended(self) -> int:
        """Spools whose latest status says that the agent ended in order."""
        latest = self.query(STATUS, "arg_max(online, status_time_us)", "group by device_id, spool_id")
        return sum(1 for (online,) in latest if not online)

    def _value(self, table: str, expression: str, where: str = "true") -> Any:
        rows = self.query(table, expression, f"where {where}")
        return rows[0][0] if rows else 0

    def _files(self, table: str) -> list[str]:
        import deltalake

        uri = str(self.folder / table)
        if not deltalake.DeltaTable.is_deltatable(uri):
            return []
        return list(deltalake.DeltaTable(uri).file_uris())
