"""Which positions the tables hold: read with column projection and folded into runs at once.

Memory is one file's two or three columns at a time, and the runs.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from central.lake.schema import TableName
from sluice.intervals import IntervalSet

Key = tuple[str, ...]
SPOOL_COLUMNS = ("device_id", "spool_id")
GAP_COLUMNS = (*SPOOL_COLUMNS, "reason")
RESULT_COLUMNS = ("task", "model", "model_version", "origin", *SPOOL_COLUMNS)


@dataclass(slots=True)
class Positions:
    """Positions of one key, and how many rows they came from (more than positions when there are duplicates)."""

    runs: IntervalSet = field(default_factory=IntervalSet)
    rows: int = 0


class RowSource(Protocol):
    """Files of a lake; see `central.lake.store.LakeStore`."""

    def rows(
        self, name: TableName, path: str, columns: Sequence[str], where: Mapping[str, str] | None = None
    ) -> pa.Table:
        """Some columns of one file."""
        ...


class PositionReader:
    """Reads positions from files of a lake."""

    def __init__(self, store: RowSource) -> None:
        self._store = store

    def records(self, paths: Iterable[str], where: Mapping[str, str] | None = None) -> dict[Key, Positions]:
        """Positions of `records`, by device and spool."""
        return self._read(TableName.RECORDS, paths, SPOOL_COLUMNS, where)

    def results(self, paths: Iterable[str], where: Mapping[str, str] | None = None) -> dict[Key, Positions]:
        """Positions of `results`, by RESULT_COLUMNS."""
        return self._read(TableName.RESULTS, paths, RESULT_COLUMNS, where)

    def gaps(self, paths: Iterable[str], where: Mapping[str, str] | None = None) -> dict[Key, Positions]:
        """Positions of `ledger`, by device, spool and reason."""
        return self._read(TableName.LEDGER, paths, GAP_COLUMNS, where, start="first_sequence", count="count")

    def _read(
        self,
        name: TableName,
        paths: Iterable[str],
        keys: Sequence[str],
        where: Mapping[str, str] | None,
        *,
        start: str = "sequence",
        count: str | None = None,
    ) -> dict[Key, Positions]:
        found: dict[Key, Positions] = defaultdict(Positions)
        columns = [*keys, start] + ([count] if count else [])
        for path in paths:
            rows = self._store.rows(name, path, columns, where)
            for key, runs, total in fold(rows, keys, start, count):
                positions = found[key]
                positions.rows += total
                for a, b in runs:
                    positions.runs.add(a, b)
        return dict(found)


def fold(
    rows: pa.Table, keys: Sequence[str], start: str, count: str | None
) -> Iterable[tuple[Key, list[tuple[int, int]], int]]:
    """Rows to `(key, runs, number of rows)`; runs `[start, stop)` may overlap when rows repeat."""
    if rows.num_rows == 0:
        return
    codes, values = _codes(rows, keys)
    starts = rows[start].to_numpy()
    stops = starts + (rows[count].to_numpy() if count else 1)
    order = np.lexsort((starts, codes))
    codes, starts, stops = codes[order], starts[order], stops[order]
    new_key = np.diff(codes, prepend=codes[0] - 1) != 0
    new_run = new_key.copy()
    new_run[1:] |= starts[1:] != stops[:-1]
    run_at = np.flatnonzero(new_run)
    run_end = np.append(run_at[1:], len(codes)) - 1
    key_at = np.flatnonzero(new_key)
    key_end = np.append(key_at[1:], len(codes))
    for a, b in zip(key_at.tolist(), key_end.tolist(), strict=True):
        low, high = np.searchsorted(run_at, (a, b))
        runs = list(zip(starts[run_at[low:high]].tolist(), stops[run_end[low:high]].tolist(), strict=True))
        yield values(int(codes[a])), runs, b - a


def _codes(rows: pa.Table, keys: Sequence[str]) -> tuple[Any, Any]:
    """One integer per row for its key, and the function that gives the key of an integer."""
    codes = np.zeros(rows.num_rows, dtype=np.int64)
    dictionaries: list[list[str]] = []
    for name in keys:
        encoded = rows[name].combine_chunks().dictionary_encode()
        dictionaries.append(encoded.dictionary.to_pylist())
        codes = codes * len(dictionaries[-1]) + encoded.indices.to_numpy(zero_copy_only=False)

    def values(code: int) -> Key:
        key: list[str] = []
        for dictionary in reversed(dictionaries):
            code, index = divmod(code, len(dictionary))
            key.append(dictionary[index])
        return tuple(reversed(key))

    return codes, values
