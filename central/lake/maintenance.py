"""Looking after a lake: describe, compact, vacuum, verify. All of it may run while the intake writes."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import WriterProperties
from deltalake.exceptions import DeltaError

from central.lake.schema import TableName
from central.lake.store import DeltaStore
from central.lake.table import DeltaSnapshot, LakeTable
from sluice.errors import Retryable

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class TableDescription:
    """A table at a glance. `offsets`: by `cluster/topic/partition`, the offset behind the last committed one."""

    name: str
    version: int
    files: int
    rows: int
    bytes: int
    partitions: int
    offsets: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {field: getattr(self, field) for field in self.__slots__}


def describe(lake: DeltaStore) -> list[TableDescription]:
    """All tables of a lake."""
    return [_describe(lake, name, table) for name, table in lake.tables.items()]


def compact(lake: DeltaStore, target_bytes: int = 256 * MIB) -> dict[str, tuple[int, int]]:
    """Joins small files within their partition.

    Args:
        lake: what to compact.
        target_bytes: aimed-at size of a file.

    Returns:
        By table: files replaced, files they became. The old ones stay until `vacuum`, for readers that use them.

    Raises:
        Retryable: a table could not be compacted now; it is as before.
    """
    properties = WriterProperties(compression="ZSTD", compression_level=max(1, lake.config.compression_level))
    done: dict[str, tuple[int, int]] = {}
    for name, table in lake.tables.items():
        handle = table.open().handle
        try:
            found = handle.optimize.compact(target_size=target_bytes, writer_properties=properties)
        except (DeltaError, OSError) as error:
            raise Retryable(f"lake: cannot compact {name.value}: {error}") from error
        done[name.value] = (int(found["numFilesRemoved"]), int(found["numFilesAdded"]))
    return done


def vacuum(lake: DeltaStore, older_than_h: int, *, dry_run: bool) -> dict[str, list[str]]:
    """Removes files that no current version names: what compaction replaced, and what a crash left behind.

    Args:
        lake: what to clean.
        older_than_h: hours since a file was last touched. It must exceed the longest flush (a file is published before
            it is named) and the longest query.
        dry_run: only say what would go.

    Returns:
        By table the files; under `staging` those that were never published.
    """
    removed: dict[str, list[str]] = {}
    for name, table in lake.tables.items():
        try:
            removed[name.value] = table.open().handle.vacuum(
                retention_hours=older_than_h, dry_run=dry_run, enforce_retention_duration=False, full=True
            )
        except (DeltaError, OSError) as error:
            raise Retryable(f"lake: cannot vacuum {name.value}: {error}") from error
    stale = lake.storage.stale_staged(time.time() - older_than_h * 3600.0)
    for path in () if dry_run else stale:
        lake.storage.discard_staged(path)
    removed["staging"] = [str(path) for path in stale]
    return removed


def verify(lake: DeltaStore) -> list[str]:
    """Checks every file that the tables name: there, of the stated size, readable, with the stated number of rows.

    Returns:
        One line for each thing that is wrong.
    """
    return [problem for name, table in lake.tables.items() for problem in _verify(lake, name, table)]


def _describe(lake: DeltaStore, name: TableName, table: LakeTable) -> TableDescription:
    snapshot = table.open()
    actions = _actions(snapshot)
    partitions = {tuple(row[f"partition.{column}"] for column in table.spec.partition_by) for row in actions}
    return TableDescription(
        name=name.value,
        version=snapshot.handle.version(),
        files=len(actions),
        rows=sum(row["num_records"] for row in actions),
        bytes=sum(row["size_bytes"] for row in actions),
        partitions=len(partitions),
        offsets=read_offsets(lake, name),
    )


def read_offsets(lake: DeltaStore, name: TableName) -> dict[str, int]:
    """All transaction versions of a table: deltalake answers for a known name only, so the log itself is read."""
    filesystem, root = lake.storage.arrow_filesystem()
    log = f"{root}/{name.value}/_delta_log"
    offsets: dict[str, int] = {}
    first = 0
    pointer = filesystem.get_file_info(f"{log}/_last_checkpoint")
    if pointer.is_file:
        with filesystem.open_input_stream(pointer.path) as stream:
            checkpoint = int(json.loads(stream.readall())["version"])
        column = pq.read_table(f"{log}/{checkpoint:020d}.checkpoint.parquet", columns=["txn"], filesystem=filesystem)
        offsets = {t["appId"]: t["version"] for t in column["txn"].to_pylist() if t and t["appId"]}
        first = checkpoint + 1
    for version in range(first, lake.tables[name].open().handle.version() + 1):
        with filesystem.open_input_stream(f"{log}/{version:020d}.json") as stream:
            actions = [json.loads(line) for line in stream.readall().splitlines()]
        offsets.update({a["txn"]["appId"]: a["txn"]["version"] for a in actions if "txn" in a})
    return dict(sorted(offsets.items()))


def _verify(lake: DeltaStore, name: TableName, table: LakeTable) -> Iterator[str]:
    filesystem, root = lake.storage.arrow_filesystem()
    there = {file.path: file.size_bytes for file in lake.storage.files(name.value)}
    for action in _actions(table.open()):
        path = action["path"]
        where = f"{name.value}/{path}"
        if path not in there:
            yield f"{where}: missing"
        elif there[path] != action["size_bytes"]:
            yield f"{where}: {there[path]} bytes instead of {action['size_bytes']}"
        else:
            try:
                rows = pq.read_metadata(f"{root}/{where}", filesystem=filesystem).num_rows
            except (OSError, pa.ArrowException) as error:
                yield f"{where}: unreadable: {error}"
                continue
            if rows != action["num_records"]:
                yield f"{where}: {rows} rows instead of {action['num_records']}"


def _actions(snapshot: DeltaSnapshot) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pa.table(snapshot.handle.get_add_actions(flatten=True)).to_pylist()
    return rows
