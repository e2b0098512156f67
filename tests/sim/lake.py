"""The lake: the real de-duplication and commit protocol over tables that live in memory; one step at a time."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from central.lake.commit import Fenced, Span, commit_primary, commit_side
from central.lake.fates import Fates
from sluice.codec import Limits, Rejected, decode
from sluice.errors import Retryable
from sluice.intervals import IntervalSet
from sluice.record import GapReason, RecordBatch
from tests.sim.bugs import Bug
from tests.sim.fake_delta import FakeDelta
from tests.sim.fake_kafka import FakeKafka
from tests.sim.world import World

Spool = tuple[str, bytes]
READ_MAX = 5


class Row(NamedTuple):
    """A row of `records`."""

    app: str
    offset: int
    spool: Spool
    sequence: int
    frame: bytes


class GapRow(NamedTuple):
    """A row of `ledger`."""

    app: str
    offset: int
    spool: Spool
    start: int
    stop: int
    reason: GapReason


@dataclass
class Tables:
    """What is durable.

    Attributes:
        committed: the offsets committed to Kafka, which are for lag metrics only.
    """

    records: FakeDelta
    ledger: FakeDelta
    committed: dict[str, int] = field(default_factory=dict)

    def positions(self) -> dict[Spool, IntervalSet]:
        """What has met its fate."""
        found: dict[Spool, IntervalSet] = defaultdict(IntervalSet)
        for row in self.records.rows:
            found[row.spool].add(row.sequence, row.sequence + 1)
        for gap in self.ledger.rows:
            found[gap.spool].add(gap.start, gap.stop)
        return found


class Lake:
    """One owner of one partition. There may be another, who believes the same."""

    def __init__(self, world: World, kafka: FakeKafka, partition: int, tables: Tables, bug: Bug | None) -> None:
        self._world = world
        self._kafka = kafka
        self._partition = partition
        self._tables = tables
        self._bug = bug
        self._app = f"c/t/{partition}"
        self.start()

    def start(self) -> None:
        """The process starts (again), or takes the partition over: a fresh look at the tables."""
        self._fates: Fates[Spool] = Fates(2, 4, lambda spool: self._tables.positions()[spool])
        self._fates.learn({spool: found.runs() for spool, found in self._tables.positions().items()})
        self._assign()

    def _assign(self) -> None:
        self._rows: list[Row] = []
        self._gaps: list[GapRow] = []
        self._start = self._tables.records.open().version_of(self._app)
        self._offset = self._start or 0
        if self._bug is Bug.KAFKAS_OFFSET:
            self._offset = self._tables.committed.get(self._app, 0)

    @property
    def idle(self) -> bool:
        """Whether everything was read and committed."""
        end = len(self._kafka.partitions[self._partition])
        return self._offset >= end and (self._start or 0) >= end

    def read(self) -> None:
        """Takes some messages."""
        for entry in self._kafka.read(self._partition, self._offset, self._world.rng.randrange(1, READ_MAX)):
            try:
                self._take(decode(entry.value, Limits()))
            except Rejected:
                raise AssertionError("the gateway exported what the lake cannot read") from None
            self._offset += 1
        self._tables.committed[self._app] = self._offset

    def flush(self) -> None:
        """Commits what was read, side table first."""
        if self._offset == (self._start or 0):
            return
        span = Span(self._app, self._start, self._offset)
        self._world.crash_point()
        try:
            commit_side(self._tables.ledger, self._gaps, [span], list)
            self._world.crash_point()
            self._commit_records(span)
        except Retryable:
            return  # the same call again settles what happened
        except Fenced:
            if self._bug is Bug.CLAIMS_SURVIVE_A_DROP:
                self._assign()
            else:
                self.start()
            return
        self._fates.settle()
        self._rows, self._gaps, self._start = [], [], self._offset

    def _commit_records(self, span: Span) -> None:
        records = self._tables.records
        if self._bug is Bug.TWO_STEPS:
            records.rows.extend(self._rows)
            self._world.crash_point()
            commit_primary(records, [], [span])
        elif self._bug is Bug.ZOMBIES_ARE_NOT_FENCED:
            records.open().commit(self._rows, {span.app: span.stop})
        else:
            commit_primary(records, self._rows, [span])

    def _take(self, batch: RecordBatch) -> None:
        spool = (batch.device_id, batch.spool_id)
        frames = dict(zip(batch.sequences(), batch.frames(), strict=True))
        for start, stop in batch.present_runs():
            for sequence in self._claimed(spool, start, stop):
                self._rows.append(Row(self._app, self._offset, spool, sequence, frames[sequence]))
        for gap in batch.gaps:
            for start, stop in self._fates.claim(spool, gap.first_sequence, gap.stop_sequence):
                self._gaps.append(GapRow(self._app, self._offset, spool, start, stop, gap.reason))

    def _claimed(self, spool: Spool, start: int, stop: int) -> list[int]:
        if self._bug is Bug.NO_DEDUPLICATION:
            return list(range(start, stop))
        return [sequence for a, b in self._fates.claim(spool, start, stop) for sequence in range(a, b)]
