"""The state of de-duplication, held against the tables: read at the start, and kept up with what others commit.

There is no side file that could disagree: the state is a function of the tables' files. Each file is read once (files
never change); what we commit ourselves is noted without reading it. A spool that was forgotten for want of memory is
read back whole, by its id, when it comes again.
"""

from collections import defaultdict

from central.lake.config import LakeConfig
from central.lake.fates import Fates
from central.lake.reading import RESULT_COLUMNS, SPOOL_COLUMNS, Key, PositionReader, Positions
from central.lake.schema import TableName
from central.lake.store import LakeStore, StoreSnapshot
from central.lake.table import DataFile
from sluice.intervals import IntervalSet

_READ = (TableName.LEDGER, TableName.RECORDS, TableName.RESULTS)


class Deduplication:
    """Which positions have met their fate.

    Attributes:
        records: by device and spool; rows of `records` and gaps of `ledger` alike.
        results: by `reading.RESULT_COLUMNS`.
    """

    def __init__(self, store: LakeStore, config: LakeConfig) -> None:
        self._tables = store.tables
        self._reader = PositionReader(store)
        self._known: dict[TableName, set[str]] = {name: set() for name in _READ}
        # Files of ours whose positions are claims as yet. If these are dropped, the files must be read like any other:
        # gaps may be in the ledger while the rows beside them were refused.
        self._noted: dict[TableName, set[str]] = {name: set() for name in _READ}
        spools, runs = config.dedup_spools_max, config.dedup_runs_max
        self.records: Fates[Key] = Fates(spools, runs, self._read_back_records)
        self.results: Fates[Key] = Fates(spools, runs, self._read_back_results)

    def refresh(self, snapshots: dict[TableName, StoreSnapshot]) -> int:
        """Learns what was committed since the last time. Nothing may be pending.

        Returns:
            How many files were read.

        Raises:
            Retryable: a file could not be read.
        """
        fresh = {name: sorted(set(snapshots[name].paths()) - self._known[name]) for name in _READ}
        spools: dict[Key, IntervalSet] = defaultdict(IntervalSet)
        for key, found in self._reader.records(fresh[TableName.RECORDS]).items():
            _merge(spools[key], found)
        for key, found in self._reader.gaps(fresh[TableName.LEDGER]).items():
            _merge(spools[key[:2]], found)
        results = self._reader.results(fresh[TableName.RESULTS])
        self.records.learn({key: runs.runs() for key, runs in spools.items()})
        self.results.learn({key: found.runs.runs() for key, found in results.items()})
        for name in _READ:
            # Only what the table still names: compaction replaces files, and the set must not grow for ever.
            self._known[name] = set(snapshots[name].paths())
        return sum(len(paths) for paths in fresh.values())

    def note(self, name: TableName, files: list[DataFile]) -> None:
        """Says that these files were committed by us: their positions are among the claims."""
        if name in self._noted:
            self._noted[name].update(file.path for file in files)

    def settle_records(self) -> None:
        """Rows and gaps of the batch are committed."""
        self.records.settle()
        self._learn_noted(TableName.RECORDS, TableName.LEDGER)

    def settle_results(self) -> None:
        """Results of the batch are committed."""
        self.results.settle()
        self._learn_noted(TableName.RESULTS)

    def drop(self) -> None:
        """Forgets what is pending."""
        self.records.drop()
        self.results.drop()
        for noted in self._noted.values():
            noted.clear()

    def _learn_noted(self, *names: TableName) -> None:
        for name in names:
            self._known[name] |= self._noted[name]
            self._noted[name].clear()

    def _read_back_records(self, key: Key) -> IntervalSet:
        where = dict(zip(SPOOL_COLUMNS, key, strict=True))
        runs = IntervalSet()
        rows = self._reader.records(self._tables[TableName.RECORDS].open().paths(), where)
        gaps = self._reader.gaps(self._tables[TableName.LEDGER].open().paths(), where)
        for found in (*rows.values(), *gaps.values()):
            _merge(runs, found)
        return runs

    def _read_back_results(self, key: Key) -> IntervalSet:
        where = dict(zip(RESULT_COLUMNS, key, strict=True))
        runs = IntervalSet()
        for found in self._reader.results(self._tables[TableName.RESULTS].open().paths(), where).values():
            _merge(runs, found)
        return runs


def _merge(into: IntervalSet, found: Positions) -> None:
    for start, stop in found.runs.runs():
        into.add(start, stop)
