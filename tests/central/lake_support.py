"""What the lake's tests share: messages, a writer, a lake in memory that passes the real one's tests."""

import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from central.decode import Message
from central.lake.commit import Conflict
from central.lake.config import LakeConfig
from central.lake.files import split_by
from central.lake.schema import SPECS, TableName
from central.lake.store import DeltaStore, LakeStore
from central.lake.table import DataFile
from central.lake.writer import LakeWriter
from protos import control_pb2, feed_pb2, record_pb2
from sluice.codec import encode, header_checksum
from sluice.connections import TelemetryConfig
from sluice.record import Gap, GapReason, Record, RecordBatch, Sensitivity, join_frames
from sluice.telemetry import Telemetry

SPOOL = bytes(range(16))
# 2026-09-21T14:13:20Z
NOW_US = 1_790_000_000_000_000
PRIMARIES = {
    "records": TableName.RECORDS,
    "results": TableName.RESULTS,
    "quarantine": TableName.QUARANTINE,
    "status": TableName.STATUS,
}


def silent() -> Telemetry:
    return Telemetry("central", TelemetryConfig(log_level="error"), stream=io.StringIO())


def counted(telemetry: Telemetry, metric: str, **labels: str) -> float:
    return telemetry.registry.get_sample_value(metric, labels) or 0.0


def records(count: int, *, time_us: int = NOW_US, text: str = "line") -> list[Record]:
    return [
        Record(time_us + i, f"{text} {i}", {"value": i * 0.5}, {"unit": "sshd"}, b"\x00\xff", "text/plain")
        for i in range(count)
    ]


def batch(
    first: int,
    rows: Sequence[Record] | int,
    *,
    gaps: Sequence[tuple[int, int, GapReason]] = (),
    device: str = "device-1",
    spool: bytes = SPOOL,
    stream: str = "logs",
    received_us: int = NOW_US,
) -> RecordBatch:
    """A batch from `first` on; the gaps' positions `(first, count, reason)` are added to its range."""
    rows = records(rows) if isinstance(rows, int) else rows
    return RecordBatch(
        device_id=device,
        spool_id=spool,
        first_sequence=first,
        record_count=len(rows) + sum(count for _, count, _ in gaps),
        stream=stream,
        site="site-1",
        data=join_frames([row.to_message().SerializeToString() for row in rows]),
        sensitivity=Sensitivity.INTERNAL,
        gaps=tuple(Gap(*gap) for gap in gaps),
        received_time_us=received_us,
    )


def envelope(first: int, rows: Sequence[Record] | int, **fields: Any) -> bytes:
    return encode(batch(first, rows, **fields)).payload


def damaged(first: int, rows: int, **fields: Any) -> bytes:
    """An envelope whose header can be read and whose records cannot."""
    message = record_pb2.Envelope.FromString(envelope(first, rows, **fields))
    message.batch = message.batch[:-1] + bytes([message.batch[-1] ^ 1])
    message.header_checksum = header_checksum(message)
    return message.SerializeToString()


def results(sequences: Sequence[int], label: str = "ok", **fields: Any) -> bytes:
    defaults = {
        "device_id": "device-1",
        "spool_id": SPOOL,
        "site": "site-1",
        "stream": "logs",
        "task": "classify",
        "model": "m",
        "model_version": "1",
        "created_time_us": NOW_US,
    }
    rows = [feed_pb2.Result(sequence=s, event_time_us=NOW_US + s, label=label, score=0.5) for s in sequences]
    return feed_pb2.ResultBatch(results=rows, **(defaults | fields)).SerializeToString()


def status(next_sequence: int, spool: Sequence[tuple[int, int]] = (), *, time_us: int = NOW_US, **fields: Any) -> bytes:
    """A status; `spool` holds inclusive ranges."""
    ranges = [control_pb2.SequenceRange(first=first, last=last) for first, last in spool]
    defaults = {"device_id": "device-1", "site": "site-1", "spool_id": SPOOL, "online": True}
    return control_pb2.Status(
        next_sequence=next_sequence, spool_ranges=ranges, status_time_us=time_us, **(defaults | fields)
    ).SerializeToString()


def message(offset: int, value: bytes, topic: str = "records", partition: int = 0, **fields: Any) -> Message:
    fields.setdefault("timestamp_us", NOW_US)
    return Message(f"default/{topic}/{partition}", topic, partition, offset, value, **fields)


def settings(folder: Path | str, **fields: Any) -> LakeConfig:
    return LakeConfig(**({"uri": str(folder), "fsync": False} | fields))


def writer_of(store: LakeStore, config: LakeConfig, telemetry: Telemetry | None = None) -> LakeWriter:
    writer = LakeWriter(config, PRIMARIES, telemetry or silent(), store, clock_us=lambda: NOW_US)
    writer.prepare()
    return writer


def delta_writer(folder: Path, telemetry: Telemetry | None = None, **fields: Any) -> tuple[LakeWriter, DeltaStore]:
    """A writer that owns partition 0 of each topic, and its lake."""
    config = settings(folder, **fields)
    store = DeltaStore(config)
    writer = writer_of(store, config, telemetry)
    writer.assign([(topic, 0) for topic in PRIMARIES])
    return writer, store


def table(store: LakeStore, name: TableName, columns: Sequence[str] = ()) -> pa.Table:
    """All rows of a table, as far as they are in its files."""
    wanted = list(columns or SPECS[name].file_schema.names)
    parts = [store.rows(name, path, wanted) for path in store.tables[name].open().paths()]
    empty = SPECS[name].file_schema.empty_table().select(wanted)
    return pa.concat_tables([empty, *(part.cast(empty.schema) for part in parts)])


def positions(store: LakeStore) -> list[tuple[str, str, int]]:
    """Every position in `records`, one entry per row."""
    rows = table(store, TableName.RECORDS, ("device_id", "spool_id", "sequence"))
    return sorted(zip(*(rows[name].to_pylist() for name in rows.column_names), strict=True))


def gap_positions(store: LakeStore) -> list[tuple[str, str, int]]:
    """Every position in `ledger`, one entry for each time that it is covered."""
    rows = table(store, TableName.LEDGER).to_pylist()
    return sorted(
        (row["device_id"], row["spool_id"], row["first_sequence"] + i) for row in rows for i in range(row["count"])
    )


class MemoryTable:
    """A table whose conflicts are Delta's: one app may be committed once on top of a snapshot."""

    def __init__(self, store: "MemoryStore") -> None:
        self.store = store
        self.commits: list[tuple[tuple[str, ...], dict[str, int]]] = []

    def open(self) -> "MemorySnapshot":
        self.store.before("open")
        return MemorySnapshot(self, len(self.commits))


class MemorySnapshot:
    def __init__(self, table: MemoryTable, version: int) -> None:
        self._table = table
        self._version = version

    def version_of(self, app: str) -> int | None:
        found = [versions[app] for _, versions in self._table.commits[: self._version] if app in versions]
        return found[-1] if found else None

    def paths(self) -> list[str]:
        return [path for paths, _ in self._table.commits[: self._version] for path in paths]

    def commit(self, files: Sequence[DataFile], versions: Mapping[str, int]) -> None:
        self._table.store.before("commit")
        for _, later in self._table.commits[self._version :]:
            if later.keys() & versions.keys():
                raise Conflict("committed since")
        self._table.commits.append((tuple(file.path for file in files), dict(versions)))
        self._table.store.before("answer")


class MemoryStore:
    """A lake in memory. `before(operation)` is called around each step; it may raise, or let another owner run."""

    def __init__(self, before: Callable[[str], None] = lambda _: None) -> None:
        self.before = before
        self.tables = {name: MemoryTable(self) for name in TableName}
        self.contents: dict[tuple[TableName, str], pa.Table] = {}
        self._names = itertools.count()

    def prepare(self) -> None:
        return

    def write(self, name: TableName, rows: pa.Table, prefix: str) -> list[DataFile]:
        files = []
        for values, part in split_by(rows, SPECS[name].partition_by):
            self.before("write")
            path = f"{'/'.join(values.values())}/{prefix}-{next(self._names)}"
            self.contents[name, path] = part
            files.append(DataFile(path, part.nbytes, part.num_rows, values, 0, "{}"))
        return files

    def remove(self, name: TableName, files: Sequence[DataFile]) -> None:
        for file in files:
            self.contents.pop((name, file.path), None)

    def rows(
        self, name: TableName, path: str, columns: Sequence[str], where: Mapping[str, str] | None = None
    ) -> pa.Table:
        rows = self.contents[name, path]
        for column, value in (where or {}).items():
            rows = rows.filter(pc.equal(rows[column], value))
        return rows.select(list(columns))
