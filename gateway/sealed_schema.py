"""The columns of the sealed store, and rows from records and results.

Two tables: `records` (what stayed, and why) and `results` (what the engine says of it). Both carry the record's
identity and `commit`, the number of the commit that made the row durable.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gateway.batches import LocalBatch
from gateway.sealed_key import CONTENT, IDENTITY
from protos import record_pb2

if TYPE_CHECKING:
    import pyarrow as pa

KEY_COLUMNS: Final = ("device_id", "spool_id", "sequence")
# The years 1 to 9999: what Python and most readers of Parquet can show.
_CALENDAR_US: Final = (-62_135_596_800_000_000, 253_402_300_800_000_000)


@dataclass(frozen=True, slots=True)
class Columns:
    """A table's columns.

    Attributes:
        types: name -> type name, in order (`_arrow` knows them).
        leaves_by_key: the Parquet leaf columns of each master key.
    """

    types: Mapping[str, str]
    leaves_by_key: Mapping[str, Sequence[str]]

    def schema(self) -> "pa.Schema":
        """As an Arrow schema."""
        import pyarrow as pa

        return pa.schema([(name, _arrow(kind)) for name, kind in self.types.items()])

    def table(self, rows: Mapping[str, Sequence[Any]], commit: int) -> "pa.Table":
        """A table of all columns but `commit`, each as a list."""
        import pyarrow as pa

        count = len(rows["sequence"])
        return pa.table({**rows, "commit": [commit] * count}, schema=self.schema())


def _arrow(kind: str) -> "pa.DataType":
    import pyarrow as pa

    kinds = {
        "string": pa.string(),
        "binary": pa.binary(),
        "long": pa.int64(),
        "double": pa.float64(),
        "bool": pa.bool_(),
        "time": pa.timestamp("us", tz="UTC"),
        "metrics": pa.map_(pa.string(), pa.float64()),
        "labels": pa.map_(pa.string(), pa.string()),
        "strings": pa.list_(pa.string()),
    }
    return kinds[kind]


def _columns(identity: Mapping[str, str], content: Mapping[str, str]) -> Columns:
    leaves = {
        IDENTITY: list(identity),
        CONTENT: [leaf for name, kind in content.items() for leaf in _leaves(name, kind)],
    }
    return Columns({**identity, **content}, leaves)


def _leaves(name: str, kind: str) -> list[str]:
    if kind in {"metrics", "labels"}:
        return [f"{name}.key_value.key", f"{name}.key_value.value"]
    return [f"{name}.list.element"] if kind == "strings" else [name]


RECORDS: Final = _columns(
    {
        "device_id": "string",
        "spool_id": "string",
        "sequence": "long",
        "event_time": "time",
        "received_time": "time",
        "site": "string",
        "stream": "string",
        "commit": "long",
    },
    {
        "text": "string",
        "metrics": "metrics",
        "labels": "labels",
        "payload": "binary",
        "content_type": "string",
        "sensitivity": "string",
        "rule": "string",
        "found": "strings",
    },
)
RESULTS: Final = _columns(
    {
        "device_id": "string",
        "spool_id": "string",
        "sequence": "long",
        "event_time": "time",
        "created_time": "time",
        "site": "string",
        "stream": "string",
        "commit": "long",
    },
    {
        "task": "string",
        "model": "string",
        "model_version": "string",
        "label": "string",
        "score": "double",
        "novelty": "double",
        "token_count": "long",
        "truncated": "bool",
        "error": "string",
    },
)


def record_rows(batches: Sequence[LocalBatch]) -> dict[str, list[Any]]:
    """Columns of `RECORDS` (all but `commit`) from batches."""
    rows: dict[str, list[Any]] = {name: [] for name in RECORDS.types if name != "commit"}
    for batch in batches:
        constant = {
            "device_id": batch.device_id,
            "spool_id": batch.spool_id.hex(),
            "received_time": batch.received_time_us,
            "site": batch.site,
            "stream": batch.stream,
            "sensitivity": batch.sensitivity.name.lower(),
        }
        for name, value in constant.items():
            rows[name].extend([value] * len(batch))
        rows["sequence"].extend(batch.sequences)
        rows["rule"].extend(d.rule for d in batch.why)
        rows["found"].extend(list(d.found) for d in batch.why)
        for frame in batch.frames:
            _append_record(rows, record_pb2.Record.FromString(frame), batch.received_time_us)
    return rows


def _append_record(rows: dict[str, list[Any]], record: record_pb2.Record, received_time_us: int) -> None:
    # As in the lake: a time outside the calendar gives way to the time of receipt. It could never be read back.
    said_us = record.event_time_us
    rows["event_time"].append(said_us if _CALENDAR_US[0] <= said_us < _CALENDAR_US[1] else received_time_us)
    rows["text"].append(record.text)
    rows["metrics"].append(list(record.metrics.items()))
    rows["labels"].append(list(record.labels.items()))
    rows["payload"].append(record.payload)
    rows["content_type"].append(record.content_type)
