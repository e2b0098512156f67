"""What happens to Kafka messages on their way into the lake. Knows no consumer: messages in, commits out.

    assign(partitions) -> where to read from        a fresh look at the tables; what waited is dropped
    add(messages)                                   decode, de-duplicate, buffer
    flush()                                         side tables, then primaries, each in one transaction with offsets

Invariants:
  * What was added is either committed with its offsets, or dropped as a whole together with its claims on positions.
  * `flush` fails with Retryable and keeps everything, or with Fenced and drops everything; then `assign` again.
  * One thread at a time.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from central.decode import Bad, EnvelopeDecoder, Good, Message
from central.lake import events, rows
from central.lake.commit import Fenced, Span, commit_primary, commit_side, require_owned, restart
from central.lake.config import LakeConfig
from central.lake.deduplication import Deduplication
from central.lake.pending import Pending, PlacedRow
from central.lake.schema import SPECS, TableName
from central.lake.store import LakeStore
from central.lake.table import DataFile
from sluice.codec import Limits
from sluice.errors import Permanent, Retryable
from sluice.record import Gap, RecordBatch
from sluice.telemetry import Telemetry

PRIMARIES = (TableName.RECORDS, TableName.RESULTS, TableName.QUARANTINE, TableName.STATUS)
SIDES = (TableName.LEDGER, TableName.QUARANTINE)


@dataclass(frozen=True, slots=True)
class Flushed:
    """What a flush has committed: rows (of all tables), and by partition the offset behind the last message."""

    rows: int
    stops: Mapping[str, int]


class LakeWriter:
    """Writes a lake.

    Args:
        config: where and when.
        primaries: by topic, the table that its messages belong to.
        limits: of one envelope.
        telemetry: for events.
        store: the lake itself.
        clock_us: UTC microseconds.
    """

    def __init__(
        self,
        config: LakeConfig,
        primaries: Mapping[str, TableName],
        telemetry: Telemetry,
        store: LakeStore,
        *,
        limits: Limits | None = None,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._config = config
        self._primaries = dict(primaries)
        self._telemetry = telemetry
        self._clock_us = clock_us
        self._store = store
        self._decoder = EnvelopeDecoder(limits or Limits())
        self._seen = Deduplication(store, config)
        self._versions: dict[str, int | None] = {}
        self.pending = Pending(config)
        self._rows = telemetry.counter("lake_table_rows", "Rows committed, by table.", ("table",))
        # Files of an attempt whose outcome is unknown: the next attempt names the same ones again.
        self._published: dict[TableName, list[DataFile]] = {}

    def prepare(self) -> None:
        """Makes folders and tables that are not there yet.

        Raises:
            ConfigError, Permanent: the lake cannot be used.
            Retryable: the store does not answer.
        """
        self._store.prepare()

    def app(self, topic: str, partition: int) -> str:
        """The name under which a partition's offsets are kept."""
        return f"{self._config.cluster}/{topic}/{partition}"

    def assign(self, partitions: Iterable[tuple[str, int]]) -> dict[tuple[str, int], int | None]:
        """Takes partitions over; the set replaces the one before.

        Returns:
            The offset to read each from; None where nothing was ever committed.

        Raises:
            Retryable: the tables cannot be read.
        """
        self.drop()
        snapshots = {name: table.open() for name, table in self._store.tables.items()}
        self._seen.refresh(snapshots)
        starts: dict[tuple[str, int], int | None] = {}
        for topic, partition in partitions:
            starts[topic, partition] = snapshots[self._primaries[topic]].version_of(self.app(topic, partition))
        self._versions = {self.app(*place): start for place, start in starts.items()}
        return starts

    def add(self, messages: Sequence[Message], now_s: float) -> None:
        """Takes messages of assigned partitions, in the order of their offsets.

        Args:
            messages: one chunk; its decoded form adds to what waits.
            now_s: monotonic seconds.

        Raises:
            Retryable: a forgotten spool could not be read back; everything that waits was dropped: `assign` again.
        """
        # Files that an attempt has published hold less than what waits from now on; `vacuum` removes them.
        self._published = {}
        kinds: dict[TableName, list[Message]] = {}
        for message in messages:
            kinds.setdefault(self._primaries[message.topic], []).append(message)
        takers = {
            TableName.RECORDS: self._add_envelopes,
            TableName.RESULTS: self._add_results,
            TableName.QUARANTINE: self._add_notices,
            TableName.STATUS: self._add_statuses,
        }
        try:
            for name, chunk in kinds.items():
                takers[name](chunk)
        except Retryable:
            self.drop()
            raise
        for message in messages:
            name = self._primaries[message.topic]
            self.pending.advance(name, message.app, message.offset + 1, now_s)

    def flush(self, reason: str = "asked") -> Flushed:
        """Commits what waits.

        Raises:
            Retryable: not all is committed; it is still here, and the same call does the rest.
            Fenced: a partition has another owner; what waited was dropped. `assign` again.
        """
        rows_total = self.pending.rows
        stops = {app: stop for stops in self.pending.stops.values() for app, stop in stops.items()}
        if not stops:
            return Flushed(0, {})
        spans = {name: self.pending.spans(name, self._versions) for name in PRIMARIES if name in self.pending.stops}
        try:
            for name, owned in spans.items():
                require_owned(self._store.tables[name].open(), owned)
            for name in SIDES:
                self._commit_side(name, [span for owned in spans.values() for span in owned])
            for name, owned in spans.items():
                self._commit_primary(name, owned)
        except Fenced:
            self._clean_up()
            self.drop()
            raise
        self._clear()
        self._telemetry.emit(events.COMMITTED, rows_total, reason=reason, partitions=len(stops))
        return Flushed(rows_total, stops)

    def drop(self) -> None:
        """Forgets what waits; it comes again from Kafka."""
        self._seen.drop()
        self._clear()

    def restart_at(self, topic: str, partition: int, offset: int) -> None:
        """Moves a partition whose offsets in Kafka no longer fit, in all tables; then `assign` again."""
        primary = self._primaries[topic]
        sides = [self._store.tables[name] for name in SIDES if name is not primary]
        restart(sides, self._store.tables[primary], self.app(topic, partition), offset)

    # --- messages to rows -------------------------------------------------------------------------------------------

    def _add_envelopes(self, messages: Sequence[Message]) -> None:
        pieces: list[rows.Piece] = []
        for outcome in self._decoder.decode(messages):
            if isinstance(outcome, Bad):
                self._add_bad(outcome)
                continue
            pieces.extend(self._claim(outcome))
            for gap in outcome.batch.gaps:
                self._add_gap(outcome.message, outcome.batch, gap)
        if pieces:
            self.pending.add_table(TableName.RECORDS, rows.record_table(pieces, self._config, self._clock_us()))

    def _claim(self, good: Good) -> list[rows.Piece]:
        """The records of an envelope whose positions had no fate yet."""
        key = (good.batch.device_id, good.batch.spool_id.hex())
        pieces: list[rows.Piece] = []
        at = 0
        for start, stop in good.batch.present_runs():
            for a, b in self._seen.records.claim(key, start, stop):
                pieces.append(rows.Piece(good, good.rows.slice(at + a - start, b - a), a))
            at += stop - start
        self._count_refused(TableName.RECORDS, at - sum(len(piece.rows) for piece in pieces))
        return pieces

    def _add_gap(self, message: Message, batch: RecordBatch, gap: Gap) -> None:
        key = (batch.device_id, batch.spool_id.hex())
        fresh = self._seen.records.claim(key, gap.first_sequence, gap.stop_sequence)
        receipt_us = rows.received_us(batch.received_time_us, message, self._clock_us())
        for a, b in fresh:
            values = rows.gap_values(batch, Gap(a, b - a, gap.reason), receipt_us)
            self.pending.add_side(TableName.LEDGER, PlacedRow(message.app, message.offset, values))
        self._count_refused(TableName.LEDGER, gap.count - sum(b - a for a, b in fresh))

    def _add_bad(self, bad: Bad) -> None:
        """Into the quarantine; when its header was readable, its positions are declared quarantined."""
        message = bad.message
        values = rows.quarantine_values(bad, self._clock_us())
        row = PlacedRow(message.app, message.offset, values)
        self.pending.add_side(TableName.QUARANTINE, row, len(message.value))
        for gap in bad.header.gaps if bad.header else ():
            assert bad.header is not None
            self._add_gap(message, bad.header, gap)
        self._telemetry.emit(
            events.QUARANTINED,
            topic=message.topic,
            reason=bad.reason,
            partition=message.partition,
            offset=message.offset,
            detail=bad.detail[:200],
        )

    def _add_results(self, messages: Sequence[Message]) -> None:
        values: list[dict[str, object]] = []
        for message in messages:
            try:
                batch = rows.parse_results(message)
            except Permanent as error:
                self._add_bad(Bad(message, "undecodable", str(error)))
                continue
            key = rows.result_key(batch)
            fresh = [r for r in batch.results if self._seen.results.claim(key, r.sequence, r.sequence + 1)]
            values += rows.result_values(batch, fresh, message, self._config, self._clock_us())
            self._count_refused(TableName.RESULTS, len(batch.results) - len(fresh))
        if values:
            self.pending.add_table(TableName.RESULTS, pa.Table.from_pylist(values, SPECS[TableName.RESULTS].schema))

    def _add_notices(self, messages: Sequence[Message]) -> None:
        values = [rows.notice_values(message, self._clock_us()) for message in messages]
        table = pa.Table.from_pylist(values, SPECS[TableName.QUARANTINE].schema)
        self.pending.add_table(TableName.QUARANTINE, table)

    def _add_statuses(self, messages: Sequence[Message]) -> None:
        for message in messages:
            try:
                self.pending.add_status(rows.status_values(message, self._clock_us()))
            except Permanent as error:
                self._add_bad(Bad(message, "undecodable", str(error)))

    def _count_refused(self, name: TableName, count: int) -> None:
        if count:
            self._telemetry.emit(events.DUPLICATES_REFUSED, count, table=name.value)

    # --- rows to commits --------------------------------------------------------------------------------------------

    def _commit_side(self, name: TableName, spans: Sequence[Span]) -> None:
        waiting = self.pending.side.get(name)
        if not waiting:
            return
        written: list[DataFile] = []

        def write(placed: Sequence[PlacedRow]) -> list[DataFile]:
            # A second call means that a conflict refused the first: its files are in no commit.
            self._store.remove(name, written)
            table = pa.Table.from_pylist([row.values for row in placed], SPECS[name].schema)
            written[:] = self._store.write(name, table, _prefix(spans))
            return written

        commit_side(self._store.tables[name], waiting, spans, write)
        # They are in; a retry of what comes after must not bring them again.
        del self.pending.side[name]
        self._note(name, written)

    def _note(self, name: TableName, files: list[DataFile]) -> None:
        """Remembers what was committed."""
        self._seen.note(name, files)
        self._rows.labels(name.value).inc(sum(file.rows for file in files))

    def _commit_primary(self, name: TableName, spans: Sequence[Span]) -> None:
        files = self._published.get(name)
        if files is None:
            files = self._published[name] = self._write_primary(name, spans)
        commit_primary(self._store.tables[name], files, spans)
        self._published.pop(name)
        self._note(name, files)
        if name is TableName.RECORDS:
            self._seen.settle_records()
        if name is TableName.RESULTS:
            self._seen.settle_results()
        self.pending.committed(name)
        self._versions.update({span.app: span.stop for span in spans})

    def _write_primary(self, name: TableName, spans: Sequence[Span]) -> list[DataFile]:
        tables = list(self.pending.tables.get(name, ()))
        if name is TableName.STATUS and self.pending.statuses:
            tables.append(pa.Table.from_pylist(list(self.pending.statuses.values()), SPECS[name].schema))
        if not tables:
            return []
        return self._store.write(name, pa.concat_tables(tables), _prefix(spans))

    def _clean_up(self) -> None:
        """Removes files of the refused batch, unless a commit names them: one of ours may have landed unheard."""
        for name, files in self._published.items():
            try:
                named = set(self._store.tables[name].open().paths())
            except Retryable:
                continue
            self._store.remove(name, [file for file in files if file.path not in named])

    def _clear(self) -> None:
        self.pending = Pending(self._config)
        self._published = {}


def _prefix(spans: Sequence[Span]) -> str:
    """Begins file names: where the first partition's rows end, so that a listing tells something."""
    first = spans[0]
    return f"{first.app.split('/', 1)[1].replace('/', '-')}-{first.stop:020d}"
