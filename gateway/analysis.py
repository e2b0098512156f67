"""On-site analysis: what the engine says of sealed texts, kept sealed, and of that what may leave.

    sealed records -> `SiteAnalysis` -> sealed results -> `ResultPublisher` -> derived results upstream (ORIGIN_SITE)

Each follows the table before it (`sealed_follow`) at its own pace. So a dead engine stops neither sealing nor what was
analysed before, and a dead uplink stops neither sealing nor analysis.

Invariants:
  * A derived result carries the record's identity and the fields of `local.analysis.export_fields`; there is no code
    here that could put a text, a label of the record, an embedding or a span of a text into one.
  * A record has one result per model: results already written are found again after a crash.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, Protocol

from gateway.local_config import AnalysisConfig, ExportField
from gateway.sealed import SealedStore
from gateway.sealed_follow import Follower
from gateway.sealed_schema import RESULTS
from protos import feed_pb2
from sluice.errors import Permanent, Retryable
from sluice.intervals import IntervalSet
from sluice.telemetry import Event, Telemetry

if TYPE_CHECKING:
    import pyarrow as pa

ANALYZED = Event(name="site_analyzed", unit="records", help="Sealed records analysed on the site.", level="debug")
PUBLISHED = Event(
    name="site_published",
    unit="results",
    help="Derived results sent upstream.",
    labels=("stream",),
    level="debug",
)
NOT_PUBLISHED = Event(
    name="site_refused",
    unit="results",
    help="Derived results that Kafka refused for ever; they are kept in the sealed store.",
    level="error",
)
_RESULTS_PER_MESSAGE_MAX: Final = 1000
# Results that share an fsync; also what a crash makes the engine repeat at most.
_ROWS_PER_COMMIT_MAX: Final = 1024
_RECORD_COLUMNS: Final = ("device_id", "spool_id", "sequence", "event_time", "site", "stream", "text")
_BATCH: Final = ("device_id", "spool_id", "site", "stream", "task", "model", "model_version")

Write = Callable[[str, str | bytes | None, bytes, Mapping[str, str | bytes] | None], Awaitable[object]]
Row = Mapping[str, Any]


class Opinion(Protocol):
    """What an analyser says of one text (`engine.analysis.Analysis`)."""

    @property
    def label(self) -> str:
        """Of the task, or empty."""
        ...

    @property
    def score(self) -> float:
        """Confidence in [0, 1]."""
        ...

    @property
    def novelty(self) -> float:
        """Distance to what the stream usually says."""
        ...

    @property
    def token_count(self) -> int:
        """Tokens that the model saw."""
        ...

    @property
    def truncated(self) -> bool:
        """Whether tokens were dropped."""
        ...

    @property
    def error(self) -> str | None:
        """Why there is no opinion, or None."""
        ...

    @property
    def reason(self) -> str:
        """Of the error, one word; `stopped` when it may be asked again."""
        ...

    @property
    def model(self) -> str:
        """The model that made it."""
        ...

    @property
    def model_version(self) -> str:
        """The model's version."""
        ...


class Analyser(Protocol):
    """What this needs of an engine (`engine.service.Engine`)."""

    async def analyze(self, texts: Sequence[str], *, task: str = ..., stream: str = ...) -> Sequence[Opinion]:
        """One opinion per text, in order."""
        ...


class SiteAnalysis:
    """Analyses sealed texts; a service.

    Args:
        store: what is analysed, and where results go.
        analyser: the engine.
        config: what is analysed, and within which limits.
        telemetry: for events.
        clock_us: Unix time in microseconds.
    """

    def __init__(
        self,
        store: SealedStore,
        analyser: Analyser,
        config: AnalysisConfig,
        telemetry: Telemetry,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._store = store
        self._analyser = analyser
        self._config = config
        self._telemetry = telemetry
        self._clock_us = clock_us
        self._done: dict[tuple[str, str], IntervalSet] | None = None
        self._follower = Follower(
            "analysis",
            store.records,
            _RECORD_COLUMNS,
            self._handle,
            store.directory,
            telemetry,
            poll_interval_s=config.poll_interval_s,
            retry_delay_s_max=config.retry_delay_s_max,
        )
        store.on_commit(self._follower.wake)

    @property
    def name(self) -> str:
        """See `Service`."""
        return "site-analysis"

    @property
    def position(self) -> int:
        """The last commit all of whose texts have results."""
        return self._follower.position

    async def run(self) -> None:
        """Analyses until drained."""
        await self._follower.run()

    async def drain(self, deadline_s: float) -> None:
        """Stops. Idempotent."""
        await self._follower.drain(deadline_s)

    async def _handle(self, table: "pa.Table") -> None:
        if self._done is None:
            # Once after a start: what was written before a crash and not yet noted in the place.
            self._done = await asyncio.to_thread(self._results_since, min(table.column("commit").to_pylist()))
        rows = [row for row in table.to_pylist() if self._wanted(row)]
        rows.sort(key=itemgetter("stream"))
        for at in range(0, len(rows), _ROWS_PER_COMMIT_MAX):
            await self._settle(rows[at : at + _ROWS_PER_COMMIT_MAX])
        self._done.clear()

    async def _settle(self, rows: Sequence[Row]) -> None:
        """Makes the results of some rows durable."""
        opinions: list[Opinion] = []
        for stream, group in groupby(rows, key=itemgetter("stream")):
            texts = [row["text"] for row in group]
            for at in range(0, len(texts), self._config.texts_per_call_max):
                opinions += await self._ask(stream, texts[at : at + self._config.texts_per_call_max])
        if not rows:
            return
        await self._store.write_results(self._columns(rows, opinions))
        done = self._done if self._done is not None else {}
        for row in rows:
            known = done.setdefault((row["device_id"], row["spool_id"]), IntervalSet())
            known.add(row["sequence"], row["sequence"] + 1)
        self._telemetry.emit(ANALYZED, len(rows))

    def _wanted(self, row: Row) -> bool:
        if not row["text"] or not any(fnmatchcase(row["stream"], glob) for glob in self._config.streams):
            return False
        done = (self._done or {}).get((row["device_id"], row["spool_id"]))
        return done is None or row["sequence"] not in done

    async def _ask(self, stream: str, texts: Sequence[str]) -> Sequence[Opinion]:
        try:
            async with asyncio.timeout(self._config.timeout_s):
                opinions = await self._analyser.analyze(texts, task=self._config.task, stream=stream)
        except TimeoutError as error:
            raise Retryable(
                f"on-site analysis of {len(texts)} texts took longer than local.analysis.timeout_s = "
                f"{self._config.timeout_s}"
            ) from error
        if stopped := next((opinion for opinion in opinions if opinion.reason == "stopped"), None):
            # Nothing is known about these texts yet: an error in the sealed store would be final.
            raise Retryable(stopped.error or "the engine stopped")
        return opinions

    def _columns(self, rows: Sequence[Row], opinions: Sequence[Opinion]) -> Mapping[str, Sequence[Any]]:
        assert len(rows) == len(opinions), "one opinion per text"
        count, now_us = len(rows), self._clock_us()
        columns: dict[str, Sequence[Any]] = {
            name: [row[name] for row in rows] for name in _RECORD_COLUMNS if name != "text"
        }
        columns |= {
            "created_time": [now_us] * count,
            "task": [self._config.task] * count,
        }
        for name in ("label", "score", "novelty", "token_count", "truncated", "error", "model", "model_version"):
            columns[name] = [getattr(opinion, name) for opinion in opinions]
        return columns

    def _results_since(self, commit: int) -> dict[tuple[str, str], IntervalSet]:
        """Identities that already have a result; results of a record are younger than its commit."""
        done: dict[tuple[str, str], IntervalSet] = {}
        for _file, table in self._store.results.scan(commit, ["device_id", "spool_id", "sequence"]):
            for row in table.to_pylist():
                known = done.setdefault((row["device_id"], row["spool_id"]), IntervalSet())
                known.add(row["sequence"], row["sequence"] + 1)
        return done


class ResultPublisher:
    """Sends derived results upstream; a service. At least once: the same identity twice is the same result.

    Args:
        store: whose results.
        config: which fields may leave.
        write: returns when upstream has the message (`KafkaWriter.write`).
        topic: where to.
        telemetry: for events.
    """

    def __init__(
        self, store: SealedStore, config: AnalysisConfig, write: Write, topic: str, telemetry: Telemetry
    ) -> None:
        self._fields = config.export_fields
        self._write = write
        self._topic = topic
        self._telemetry = telemetry
        self._follower = Follower(
            "published",
            store.results,
            [name for name in RESULTS.types if name != "commit"],
            self._handle,
            store.directory,
            telemetry,
            poll_interval_s=config.poll_interval_s,
            retry_delay_s_max=config.retry_delay_s_max,
        )
        store.on_commit(self._follower.wake)

    @property
    def name(self) -> str:
        """See `Service`."""
        return "result-publisher"

    @property
    def position(self) -> int:
        """The last commit of results that upstream has."""
        return self._follower.position

    async def run(self) -> None:
        """Publishes until drained."""
        await self._follower.run()

    async def drain(self, deadline_s: float) -> None:
        """Stops. Idempotent."""
        await self._follower.drain(deadline_s)

    async def _handle(self, table: "pa.Table") -> None:
        for batch in derived(table.to_pylist(), self._fields) if self._fields else ():
            headers = {"site": batch.site, "stream": batch.stream, "device": batch.device_id}
            try:
                await self._write(self._topic, batch.device_id, batch.SerializeToString(), headers)
            except Permanent as error:
                self._telemetry.emit(NOT_PUBLISHED, len(batch.results), detail=str(error))
                continue
            self._telemetry.emit(PUBLISHED, len(batch.results), stream=batch.stream)


def derived(rows: Sequence[Row], fields: Sequence[ExportField]) -> Iterator[feed_pb2.ResultBatch]:
    """Rows of `RESULTS` as messages that hold identity and the listed fields, nothing else.

    Args:
        rows: as dictionaries; those with an error are left out.
        fields: what may leave.
    """
    key = itemgetter(*_BATCH)
    for values, group in groupby(sorted((r for r in rows if r["error"] is None), key=key), key=key):
        results = [_result(row, fields) for row in group]
        for at in range(0, len(results), _RESULTS_PER_MESSAGE_MAX):
            device_id, spool_id, site, stream, task, model, model_version = values
            yield feed_pb2.ResultBatch(
                device_id=device_id,
                spool_id=bytes.fromhex(spool_id),
                site=site,
                stream=stream,
                origin=feed_pb2.ORIGIN_SITE,
                task=task,
                model=model,
                model_version=model_version,
                created_time_us=max(_us(row["created_time"]) for row in rows),
                results=results[at : at + _RESULTS_PER_MESSAGE_MAX],
            )


def _result(row: Row, fields: Sequence[ExportField]) -> feed_pb2.Result:
    result = feed_pb2.Result(sequence=row["sequence"])
    if "label" in fields:
        result.label = row["label"]
    if "score" in fields:
        result.score = row["score"]
    if "novelty" in fields:
        result.novelty = row["novelty"]
    if "token_count" in fields:
        result.token_count = row["token_count"]
    if "truncated" in fields:
        result.truncated = row["truncated"]
    if "event_time" in fields:
        result.event_time_us = _us(row["event_time"])
    return result


def _us(moment: Any) -> int:
    """A UTC time in microseconds."""
    return int(moment.timestamp()) * 1_000_000 + int(moment.microsecond)
