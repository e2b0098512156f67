"""Arrow tables to published Parquet files: one file per partition value, zstd, page index, statistics, dictionaries.

The row groups hold `row_group_rows` rows, whatever the batches were that the rows arrived in.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from central.lake.config import LakeConfig
from central.lake.schema import TIMESTAMP, TableSpec
from central.lake.storage import LakeStorage
from central.lake.table import DataFile, statistics_json
from sluice.errors import Retryable

# Columns whose values hardly ever repeat: a dictionary would be built, found too large, and thrown away.
_NO_DICTIONARY = frozenset({"sequence", "first_sequence", "event_time", "payload", "original", "embedding", "score"})


class ParquetFiles:
    """Writes files of one lake."""

    def __init__(self, storage: LakeStorage, config: LakeConfig) -> None:
        self._storage = storage
        self._config = config

    def write(self, spec: TableSpec, rows: pa.Table, prefix: str) -> list[DataFile]:
        """Writes and publishes rows; no commit names the files yet.

        Args:
            spec: the table.
            rows: with all its columns, in its schema.
            prefix: begins the files' names; with a random part it must be unique.

        Raises:
            Retryable: disk or store failed. Files published before that are removed.
        """
        done: list[DataFile] = []
        try:
            for values, part in split_by(rows, spec.partition_by):
                done.append(self._write_one(spec, values, part, prefix))
        except Retryable:
            self.remove(spec, done)
            raise
        return done

    def remove(self, spec: TableSpec, files: Iterable[DataFile]) -> None:
        """Removes files that were not committed. What cannot be removed is left to `vacuum`."""
        for file in files:
            try:
                self._storage.remove(spec.name.value, file.path)
            except Retryable:
                continue

    def _write_one(self, spec: TableSpec, values: dict[str, str], rows: pa.Table, prefix: str) -> DataFile:
        staged = self._storage.stage()
        try:
            self._encode(spec, rows, staged)
            size_bytes = staged.stat().st_size
            folder = "/".join(f"{column}={value}" for column, value in values.items())
            path = f"{folder}/{prefix}-{staged.stem}.parquet"
            self._storage.publish(staged, spec.name.value, path)
        except OSError as error:
            raise Retryable(f"lake: cannot write {spec.name.value}: {error}") from error
        finally:
            self._storage.discard_staged(staged)
        return DataFile(
            path=path,
            size_bytes=size_bytes,
            rows=rows.num_rows,
            partition=values,
            modified_ms=int(time.time() * 1000),
            statistics=_statistics(rows, spec.statistics),
        )

    def _encode(self, spec: TableSpec, rows: pa.Table, path: Path) -> None:
        schema = spec.file_schema
        names = [name for name in schema.names if name not in _NO_DICTIONARY]
        with pq.ParquetWriter(
            path,
            schema,
            compression="zstd",
            compression_level=self._config.compression_level,
            use_dictionary=_leaf_paths(schema, names),
            write_statistics=True,
            write_page_index=True,
            version="2.6",
            # Without it other readers see what pyarrow sees: plain Parquet types.
            store_schema=False,
        ) as writer:
            writer.write_table(rows.select(schema.names), row_group_size=self._config.row_group_rows)


def split_by(rows: pa.Table, columns: tuple[str, ...]) -> Iterator[tuple[dict[str, str], pa.Table]]:
    """The rows by the values of `columns` (as text); the order of rows with the same values is kept."""
    if rows.num_rows == 0:
        return
    codes = np.zeros(rows.num_rows, dtype=np.int64)
    for name in columns:
        encoded = rows[name].combine_chunks().dictionary_encode()
        codes = codes * len(encoded.dictionary) + encoded.indices.to_numpy(zero_copy_only=False)
    if codes.min() != codes.max():
        # One sort and slices, so that a thousand partitions in a backlog cost no thousand filters.
        order = np.argsort(codes, kind="stable")
        codes = codes[order]
        rows = rows.take(pa.array(order))
    starts = np.flatnonzero(np.diff(codes, prepend=codes[0] - 1))
    stops = np.append(starts[1:], rows.num_rows)
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        part = rows.slice(start, stop - start)
        yield {name: str(part[name][0].as_py()) for name in columns}, part


def _leaf_paths(schema: pa.Schema, names: list[str]) -> list[str]:
    """Column paths as Parquet names them, for the columns `names`."""
    paths: list[str] = []
    for name in names:
        kind = schema.field(name).type
        if pa.types.is_map(kind):
            paths += [f"{name}.key_value.key"]
            paths += [f"{name}.key_value.value"] if pa.types.is_string(kind.item_type) else []
        elif not pa.types.is_nested(kind):
            paths.append(name)
    return paths


def _statistics(rows: pa.Table, columns: tuple[str, ...]) -> str:
    low: dict[str, Any] = {}
    high: dict[str, Any] = {}
    nulls: dict[str, int] = {}
    for name in columns:
        ends = pc.min_max(rows[name])
        nulls[name] = rows[name].null_count
        if ends["min"].is_valid:
            low[name], high[name] = _plain(ends["min"]), _plain(ends["max"])
    return statistics_json(rows.num_rows, low, high, nulls)


def _plain(value: pa.Scalar) -> Any:
    if value.type == TIMESTAMP:
        return value.as_py().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return value.as_py()
