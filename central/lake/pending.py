"""What waits for the next flush, and when that is due. Pure: it is handed the time.

Bounded by `flush_bytes_max` and `flush_rows_max`, plus one chunk: the owner flushes, or stops reading, when `due`.
"""

from dataclasses import dataclass, field
from typing import Any

from central.lake.commit import Span
from central.lake.config import LakeConfig
from central.lake.schema import TableName
from sluice.ledger import status_order

# What a row held as Python values costs beside its bytes.
_ROW_OVERHEAD_BYTES = 400


@dataclass(frozen=True, slots=True)
class PlacedRow:
    """A row of a small table, as a mapping, with its place in Kafka."""

    app: str
    offset: int
    values: dict[str, Any]


@dataclass(slots=True)
class Pending:
    """The batch that is being filled.

    Attributes:
        tables: Arrow tables by primary table.
        side: rows of side tables.
        stops: by primary table and partition, the offset behind the last message.
    """

    config: LakeConfig
    tables: dict[TableName, list[Any]] = field(default_factory=dict)
    side: dict[TableName, list[PlacedRow]] = field(default_factory=dict)
    stops: dict[TableName, dict[str, int]] = field(default_factory=dict)
    statuses: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    bytes: int = 0
    rows: int = 0
    oldest_s: float | None = None
    newest_s: float = 0.0

    @property
    def empty(self) -> bool:
        """Whether no message waits."""
        return not self.stops

    def advance(self, name: TableName, app: str, stop: int, now_s: float) -> None:
        """Notes that a partition was read up to `stop` (exclusive)."""
        self.stops.setdefault(name, {})[app] = stop
        self.oldest_s = now_s if self.oldest_s is None else self.oldest_s
        self.newest_s = now_s

    def add_table(self, name: TableName, table: Any) -> None:
        """Adds rows of a primary table, as an Arrow table."""
        self.tables.setdefault(name, []).append(table)
        self.rows += table.num_rows
        self.bytes += table.nbytes

    def add_side(self, name: TableName, row: PlacedRow, size_bytes: int = 0) -> None:
        """Adds a row of a side table."""
        self.side.setdefault(name, []).append(row)
        self.rows += 1
        self.bytes += size_bytes + _ROW_OVERHEAD_BYTES

    def add_status(self, values: dict[str, Any]) -> None:
        """Keeps the latest status of each spool."""
        key = (values["device_id"], values["spool_id"])
        old = self.statuses.get(key)
        if old is None:
            self.rows += 1
            self.bytes += _ROW_OVERHEAD_BYTES
        elif _order(old) > _order(values):
            return
        self.statuses[key] = values

    def spans(self, name: TableName, versions: dict[str, int | None]) -> list[Span]:
        """What each partition of a primary table brings, given the versions it began at."""
        return [Span(app, versions[app], stop) for app, stop in sorted(self.stops.get(name, {}).items())]

    def committed(self, name: TableName) -> None:
        """The rows of a primary table are in the lake."""
        self.stops.pop(name, None)
        self.tables.pop(name, None)

    def due(self, now_s: float) -> str | None:
        """Why it is time to flush: `bytes`, `rows`, `age` or `idle`; None when it is not."""
        if self.oldest_s is None:
            return None
        if self.bytes >= self.config.flush_bytes_max:
            return "bytes"
        if self.rows >= self.config.flush_rows_max:
            return "rows"
        if now_s - self.oldest_s >= self.config.flush_interval_s:
            return "age"
        if now_s - self.newest_s >= self.config.flush_idle_s:
            return "idle"
        return None


def _order(status: dict[str, Any]) -> tuple[int, int, int]:
    return *status_order(status["next_sequence"], status["spool_records"]), status["status_time_us"]
