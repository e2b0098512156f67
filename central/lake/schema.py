"""The columns of the tables. Part of the contract with whoever queries the lake: columns are only ever added.

Timestamps are UTC microseconds, so that every table stays at Delta protocol 1/2, which all readers know.
`date` and `stream` are partition columns: they are in the path (and in Delta), not in the Parquet files.

An event time that no clock can have meant (before 1970, or beyond 2262, where nanosecond readers overflow) does not
become a column value: the row is kept, `event_time` is the time of receipt, `event_time_valid` is false, and
`event_time_device_us` holds what the device said.
"""

from dataclasses import dataclass
from enum import Enum

import pyarrow as pa

TIMESTAMP = pa.timestamp("us", "UTC")
# Exclusive limits, in microseconds since 1970. Zero is a clock that was never set.
EVENT_TIME_US_MIN = 0
EVENT_TIME_US_MAX = 2**63 // 1000


class TableName(Enum):
    """The tables; the value is the directory's name."""

    RECORDS = "records"
    RESULTS = "results"
    LEDGER = "ledger"
    QUARANTINE = "quarantine"
    STATUS = "status"


def _field(name: str, kind: pa.DataType, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable)


_IDENTITY = [_field("device_id", pa.string()), _field("spool_id", pa.string())]

RECORDS = pa.schema(
    [
        *_IDENTITY,
        _field("sequence", pa.int64()),
        _field("site", pa.string()),
        _field("event_time", TIMESTAMP),
        _field("received_time", TIMESTAMP),
        _field("event_time_valid", pa.bool_()),
        _field("event_time_device_us", pa.int64(), nullable=True),
        _field("sensitivity", pa.string()),
        _field("text", pa.string()),
        _field("metrics", pa.map_(pa.string(), pa.float64())),
        _field("labels", pa.map_(pa.string(), pa.string())),
        _field("payload", pa.binary()),
        _field("content_type", pa.string()),
        _field("stream", pa.string()),
        _field("date", pa.date32()),
    ]
)

RESULTS = pa.schema(
    [
        *_IDENTITY,
        _field("sequence", pa.int64()),
        _field("site", pa.string()),
        _field("origin", pa.string()),
        _field("task", pa.string()),
        _field("model", pa.string()),
        _field("model_version", pa.string()),
        _field("event_time", TIMESTAMP),
        _field("created_time", TIMESTAMP),
        _field("label", pa.string()),
        _field("score", pa.float32()),
        _field("novelty", pa.float32()),
        _field("embedding", pa.binary()),
        _field("token_count", pa.int32()),
        _field("truncated", pa.bool_()),
        _field("stream", pa.string()),
        _field("date", pa.date32()),
    ]
)

LEDGER = pa.schema(
    [
        *_IDENTITY,
        _field("first_sequence", pa.int64()),
        _field("count", pa.int64()),
        _field("reason", pa.string()),
        _field("site", pa.string()),
        _field("stream", pa.string()),
        _field("received_time", TIMESTAMP),
        _field("date", pa.date32()),
    ]
)

QUARANTINE = pa.schema(
    [
        _field("device_id", pa.string(), nullable=True),
        _field("spool_id", pa.string(), nullable=True),
        _field("first_sequence", pa.int64(), nullable=True),
        _field("record_count", pa.int64(), nullable=True),
        _field("site", pa.string(), nullable=True),
        _field("stream", pa.string(), nullable=True),
        _field("reason", pa.string()),
        _field("detail", pa.string()),
        _field("received_time", TIMESTAMP),
        _field("original", pa.binary()),
        _field("original_bytes", pa.int64()),
        _field("origin", pa.string()),
        _field("topic", pa.string()),
        _field("partition", pa.int32()),
        _field("offset", pa.int64()),
        _field("date", pa.date32()),
    ]
)

STATUS = pa.schema(
    [
        *_IDENTITY,
        _field("site", pa.string()),
        _field("next_sequence", pa.int64()),
        _field("spool_records", pa.int64()),
        _field("spool_bytes", pa.int64()),
        _field("spool_oldest_time_us", pa.int64()),
        _field("spool_ranges", pa.list_(pa.struct([_field("start", pa.int64()), _field("stop", pa.int64())]))),
        _field("agent_version", pa.string()),
        _field("uptime_s", pa.float64()),
        _field("online", pa.bool_()),
        _field("expired_records", pa.int64()),
        _field("status_time_us", pa.int64()),
        _field("received_time", TIMESTAMP),
        _field("date", pa.date32()),
    ]
)


@dataclass(frozen=True, slots=True)
class TableSpec:
    """A table: its columns, how it is partitioned, and the columns whose minimum and maximum a file states."""

    name: TableName
    schema: pa.Schema
    partition_by: tuple[str, ...]
    statistics: tuple[str, ...]

    @property
    def file_schema(self) -> pa.Schema:
        """The columns inside the Parquet files."""
        return pa.schema([f for f in self.schema if f.name not in self.partition_by])


SPECS = {
    spec.name: spec
    for spec in (
        TableSpec(
            TableName.RECORDS,
            RECORDS,
            ("stream", "date"),
            ("device_id", "spool_id", "sequence", "site", "event_time", "received_time"),
        ),
        TableSpec(
            TableName.RESULTS,
            RESULTS,
            ("stream", "date"),
            ("device_id", "spool_id", "sequence", "site", "event_time", "created_time"),
        ),
        TableSpec(TableName.LEDGER, LEDGER, ("date",), ("device_id", "spool_id", "first_sequence", "received_time")),
        TableSpec(TableName.QUARANTINE, QUARANTINE, ("date",), ("received_time",)),
        TableSpec(TableName.STATUS, STATUS, ("date",), ("device_id", "spool_id", "status_time_us")),
    )
}
