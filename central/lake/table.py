"""One Delta table: fresh snapshots, commits with versions, and the files that a version names.

deltalake's exceptions end here: a refused transaction is `Conflict`, whatever else a store does is `Retryable`.
Every snapshot is read anew from the store; a handle is never used for a second commit.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deltalake
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from central.lake.commit import Conflict
from central.lake.config import LakeConfig
from central.lake.schema import TableSpec
from central.lake.storage import LakeStorage
from sluice.errors import Permanent, Retryable

# deltalake raises OSError and its own errors; objects in stores also come as ValueError (bad option, bad URL).
_STORE_ERRORS = (DeltaError, OSError)


@dataclass(frozen=True, slots=True)
class DataFile:
    """A published Parquet file.

    Attributes:
        path: relative to the table.
        partition: value of each partition column, as Delta writes it.
        statistics: Delta's JSON: numRecords, minValues, maxValues, nullCount.
    """

    path: str
    size_bytes: int
    rows: int
    partition: Mapping[str, str]
    modified_ms: int
    statistics: str


class DeltaSnapshot:
    """See `central.lake.commit.Snapshot`."""

    def __init__(self, table: "LakeTable", handle: DeltaTable) -> None:
        self._table = table
        self.handle = handle

    def version_of(self, app: str) -> int | None:
        """See the protocol."""
        version = self.handle.transaction_version(app)
        return None if version is None else int(version)

    def commit(self, files: Sequence[DataFile], versions: Mapping[str, int]) -> None:
        """See the protocol."""
        spec = self._table.spec
        adds: list[AddAction | RemoveAction] = [
            AddAction(
                path=file.path,
                size=file.size_bytes,
                partition_values=dict(file.partition),
                modification_time=file.modified_ms,
                data_change=True,
                stats=file.statistics,
            )
            for file in files
        ]
        properties = CommitProperties(app_transactions=[Transaction(app, v) for app, v in versions.items()])
        try:
            self.handle.create_write_transaction(
                adds, "append", self._table.delta_schema, list(spec.partition_by), commit_properties=properties
            )
        except CommitFailedError as error:
            if "transaction" in str(error).lower() and "concurrent" in str(error).lower():
                raise Conflict(f"{spec.name.value}: {error}") from error
            raise Retryable(f"lake: commit to {spec.name.value} failed: {error}") from error
        except _STORE_ERRORS as error:
            raise Retryable(f"lake: commit to {spec.name.value} failed: {error}") from error
        self._table.storage.sync_commit(spec.name.value, self.handle.version() + 1)

    def paths(self) -> list[str]:
        """The files of this version, relative to the table."""
        import pyarrow as pa

        return [str(path) for path in pa.table(self.handle.get_add_actions(flatten=True))["path"].to_pylist()]

    def uris(self) -> list[str]:
        """Addresses of the files of this version, for DuckDB, Polars and pyarrow."""
        return [str(uri) for uri in self.handle.file_uris()]


class LakeTable:
    """One table of the lake. `open` may be called by any thread."""

    def __init__(self, storage: LakeStorage, spec: TableSpec, config: LakeConfig) -> None:
        self.storage = storage
        self.spec = spec
        self.uri = storage.table_uri(spec.name.value)
        self.delta_schema = deltalake.Schema.from_arrow(spec.schema)
        self._config = config

    def create(self) -> None:
        """Creates the table unless it exists.

        Raises:
            Retryable: the store does not answer.
            Permanent: the table has columns that this version does not know how to write.
        """
        settings = {
            "delta.checkpointInterval": str(self._config.checkpoint_interval_commits),
            "delta.logRetentionDuration": f"interval {self._config.log_retention_hours} hours",
            "delta.enableExpiredLogCleanup": "true",
        }
        try:
            if not DeltaTable.is_deltatable(self.uri, self.storage.options):
                DeltaTable.create(
                    self.uri,
                    self.spec.schema,
                    mode="ignore",
                    partition_by=list(self.spec.partition_by),
                    name=self.spec.name.value,
                    configuration=settings,
                    storage_options=self.storage.options,
                )
        except _STORE_ERRORS as error:
            raise Retryable(f"lake: cannot create {self.uri}: {error}") from error
        found = {field.name for field in self.open().handle.schema().fields}
        if found != set(self.spec.schema.names):
            difference = ", ".join(sorted(found ^ set(self.spec.schema.names)))
            raise Permanent(f"lake: table {self.uri} was made by another version; columns that differ: {difference}")

    def exists(self) -> bool:
        """Whether the table is there."""
        try:
            return bool(DeltaTable.is_deltatable(self.uri, self.storage.options))
        except _STORE_ERRORS as error:
            raise Retryable(f"lake: cannot look at {self.uri}: {error}") from error

    def open(self) -> DeltaSnapshot:
        """See `central.lake.commit.Log`."""
        try:
            return DeltaSnapshot(self, DeltaTable(self.uri, storage_options=self.storage.options))
        except TableNotFoundError as error:
            raise Retryable(f"lake: there is no table at {self.uri}") from error
        except _STORE_ERRORS as error:
            raise Retryable(f"lake: cannot open {self.uri}: {error}") from error


def statistics_json(rows: int, low: Mapping[str, Any], high: Mapping[str, Any], nulls: Mapping[str, int]) -> str:
    """A file's statistics as Delta writes them."""
    return json.dumps({"numRecords": rows, "minValues": low, "maxValues": high, "nullCount": nulls})
