"""What the lake is made of, as the writer and the books see it: tables with versions, and files with rows.

`LakeStore` is the seam: `DeltaStore` is the real one, on a directory or an object store; simulations bring one in
memory that passes the same tests.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from central.lake.commit import Snapshot
from central.lake.config import LakeConfig
from central.lake.files import ParquetFiles
from central.lake.schema import SPECS, TableName
from central.lake.storage import LakeStorage
from central.lake.table import DataFile, LakeTable
from sluice.errors import Permanent, Retryable


class StoreSnapshot(Snapshot[DataFile], Protocol):
    """One version of a table, and the files that it names."""

    def paths(self) -> list[str]:
        """The files of this version, relative to the table."""
        ...


class StoreTable(Protocol):
    """A table."""

    def open(self) -> StoreSnapshot:
        """A fresh snapshot. Raises Retryable."""
        ...


class LakeStore(Protocol):
    """A lake."""

    @property
    def tables(self) -> Mapping[TableName, StoreTable]:
        """Its tables by name."""
        ...

    def prepare(self) -> None:
        """Makes what is not there yet. Raises ConfigError, Permanent, Retryable."""
        ...

    def write(self, name: TableName, rows: pa.Table, prefix: str) -> list[DataFile]:
        """Publishes rows as files that no commit names yet. Raises Retryable, and leaves none then."""
        ...

    def remove(self, name: TableName, files: Sequence[DataFile]) -> None:
        """Removes files that no commit names. What cannot be removed stays, for `vacuum`."""
        ...

    def rows(
        self, name: TableName, path: str, columns: Sequence[str], where: Mapping[str, str] | None = None
    ) -> pa.Table:
        """Some columns of one file, of the rows that have the values of `where`. Raises Retryable."""
        ...


class DeltaStore:
    """See `LakeStore`. Several processes may use one lake.

    Attributes:
        storage: its files.
        tables: its tables; `open_lake` leaves out those that were never made.
    """

    def __init__(self, config: LakeConfig) -> None:
        self.config = config
        self.storage = LakeStorage(config)
        self.tables: dict[TableName, LakeTable] = {
            name: LakeTable(self.storage, spec, config) for name, spec in SPECS.items()
        }
        self._files = ParquetFiles(self.storage, config)

    def prepare(self) -> None:
        """See `LakeStore`."""
        self.storage.prepare()
        for table in self.tables.values():
            table.create()

    def write(self, name: TableName, rows: pa.Table, prefix: str) -> list[DataFile]:
        """See `LakeStore`."""
        return self._files.write(SPECS[name], rows, prefix)

    def remove(self, name: TableName, files: Sequence[DataFile]) -> None:
        """See `LakeStore`."""
        self._files.remove(SPECS[name], files)

    def rows(
        self, name: TableName, path: str, columns: Sequence[str], where: Mapping[str, str] | None = None
    ) -> pa.Table:
        """See `LakeStore`; `where` also prunes row groups."""
        filesystem, root = self.storage.arrow_filesystem()
        filters = [(column, "==", value) for column, value in where.items()] if where else None
        try:
            # Without `partitioning=None` pyarrow would add the path's columns.
            return pq.read_table(
                f"{root}/{name.value}/{path}",
                columns=list(columns),
                filesystem=filesystem,
                filters=filters,
                partitioning=None,
            )
        except (OSError, pa.ArrowException) as error:
            # Compaction and vacuum may have removed it since the table was opened.
            raise Retryable(f"lake: cannot read {name.value}/{path}: {error}") from error


def open_lake(config: LakeConfig) -> DeltaStore:
    """Opens a lake that exists, without changing anything.

    Raises:
        Permanent: there is no lake at this address.
        Retryable: the store does not answer.
    """
    store = DeltaStore(config)
    store.tables = {name: table for name, table in store.tables.items() if table.exists()}
    if TableName.RECORDS not in store.tables:
        raise Permanent(f"there is no lake at {store.storage.uri}: no table '{TableName.RECORDS.value}' in it")
    return store
