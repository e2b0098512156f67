"""On-site analysis follows sealing, at its own pace; of its results only the listed fields go upstream."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import pytest

from engine.analysis import Analysis
from engine.spans import Span
from gateway.analysis import ResultPublisher, SiteAnalysis, derived
from gateway.local_config import AnalysisConfig, ExportField, LocalConfig
from gateway.sealed import SealedReader, SealedStore
from gateway.sealed_schema import RESULTS
from protos import feed_pb2
from sluice.errors import Permanent, Retryable
from tests.gateway.sealed_support import Analyser, Log, config, local_batch, open_store, until

QUICK = AnalysisConfig(poll_interval_s=0.02, retry_delay_s_max=0.02, texts_per_call_max=4, timeout_s=0.2)


class Upstream:
    """Kafka, as far as a publisher can tell."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.sent: list[feed_pb2.ResultBatch] = []
        self.raw = b""
        self.headers: list[Mapping[str, str | bytes] | None] = []

    async def write(
        self, topic: str, key: str | bytes | None, value: bytes, headers: Mapping[str, str | bytes] | None
    ) -> None:
        if self.error:
            raise self.error
        assert topic == "sluice.results"
        self.raw += value
        self.headers.append(headers)
        self.sent.append(feed_pb2.ResultBatch.FromString(value))

    @property
    def sequences(self) -> list[int]:
        return [r.sequence for batch in self.sent for r in batch.results]


class Site:
    """A store with its followers, running."""

    def __init__(self, settings: LocalConfig, analyser: Analyser, upstream: Upstream) -> None:
        self.log = Log()
        self.settings = settings
        self.store: SealedStore = open_store(settings, self.log)
        self.analysis = SiteAnalysis(self.store, analyser, settings.analysis, self.log.telemetry)
        self.publisher = ResultPublisher(
            self.store, settings.analysis, upstream.write, "sluice.results", self.log.telemetry
        )
        self.running = [asyncio.create_task(s.run()) for s in (self.analysis, self.publisher, self.store)]

    def results(self) -> list[dict[str, object]]:
        rows = [row for table in SealedReader(self.settings).read_results() for row in table.to_pylist()]
        return sorted(rows, key=lambda row: (row["device_id"], row["sequence"]))

    def raw_results(self) -> int:
        return sum(f.rows for f in self.store.results.files())

    async def end(self) -> None:
        for service in (self.analysis, self.publisher, self.store):
            await service.drain(1)
        await asyncio.wait_for(asyncio.gather(*self.running), 10)


def site(tmp_path: Path, analyser: Analyser, upstream: Upstream, **analysis: object) -> Site:
    values = {name: getattr(QUICK, name) for name in QUICK.__struct_fields__} | analysis
    return Site(config(tmp_path, analysis=AnalysisConfig(**values)), analyser, upstream)


async def test_sealed_texts_get_a_sealed_result_and_a_derived_one_upstream(tmp_path: Path) -> None:
    analyser, upstream = Analyser(), Upstream()
    here = site(tmp_path, analyser, upstream)
    await here.store.write(local_batch(0, 10))
    await here.store.write(local_batch(0, 3, device="pump-8", text=""))
    await until(lambda: len(upstream.sequences) == 10, "derived results")
    await here.end()
    rows = here.results()
    assert [row["sequence"] for row in rows] == list(range(10)), "records without a text have no result"
    assert rows[3]["label"] == f"length {len('call bob@example.com 3')}"
    assert (rows[3]["model"], rows[3]["model_version"], rows[3]["task"]) == ("length", "1", "classify")
    batch = upstream.sent[0]
    assert (batch.device_id, batch.site, batch.stream, batch.task) == ("pump-7", "plant", "syslog", "classify")
    assert (batch.spool_id, batch.origin) == (bytes(range(16)), feed_pb2.ORIGIN_SITE)
    assert upstream.headers[0] == {"site": "plant", "stream": "syslog", "device": "pump-7"}


async def test_only_the_listed_fields_leave(tmp_path: Path) -> None:
    analyser, upstream = Analyser(), Upstream()
    here = site(tmp_path, analyser, upstream)
    await here.store.write(local_batch(7, 2))
    await until(lambda: len(upstream.sequences) == 2, "derived results")
    await here.end()
    for batch in upstream.sent:
        for result in batch.results:
            assert {field.name for field, _ in result.ListFields()} == {"sequence", "label", "score"}
    assert b"bob" not in upstream.raw
    assert b"pump" in upstream.raw, "the device's name is part of the identity"


async def test_further_fields_leave_when_they_are_listed(tmp_path: Path) -> None:
    upstream = Upstream()
    fields = ("label", "novelty", "token_count", "event_time")
    here = site(tmp_path, Analyser(), upstream, export_fields=fields)
    await here.store.write(local_batch(7, 1))
    await until(lambda: bool(upstream.sequences), "derived results")
    await here.end()
    (result,) = upstream.sent[0].results
    assert {f.name for f, _ in result.ListFields()} == {"sequence", "label", "novelty", "token_count", "event_time_us"}
    assert result.event_time_us == 1_760_000_000_000_007


class Spanning(Analyser):
    """Says whose names stand where, as a model for the task `tokens` does."""

    async def analyze(self, texts: Sequence[str], *, task: str = "classify", stream: str = "") -> Any:
        spans = (Span(5, 20, "canary-name", 0.5),)
        return [Analysis("PER", 0.5, embedding=b"canary-vector", spans=spans, model="m") for _ in texts]


async def test_spans_of_sealed_texts_are_neither_kept_nor_sent(tmp_path: Path) -> None:
    upstream = Upstream()
    every = get_args(ExportField)
    here = site(tmp_path, Spanning(), upstream, task="tokens", export_fields=every)
    await here.store.write(local_batch(7, 2))
    await until(lambda: len(upstream.sequences) == 2, "derived results")
    await here.end()
    assert [(row["label"], row["score"]) for row in here.results()] == [("PER", 0.5)] * 2
    assert "canary" not in repr(here.results())
    assert b"canary" not in upstream.raw
    assert not any(result.spans or result.embedding for batch in upstream.sent for result in batch.results)


def test_no_column_or_field_could_carry_a_span_or_an_embedding() -> None:
    assert not {"spans", "embedding", "text"} & {*RESULTS.types, *get_args(ExportField)}
    row: dict[str, Any] = dict.fromkeys(RESULTS.types, "") | {
        "sequence": 7,
        "error": None,
        "score": 0.5,
        "novelty": 0.5,
    }
    row |= {"token_count": 3, "truncated": True, "label": "PER", "spans": [Span(0, 1, "x", 1.0)], "embedding": b"x"}
    row |= {"event_time": datetime.now(UTC), "created_time": datetime.now(UTC)}
    (batch,) = derived([row], get_args(ExportField))
    (result,) = batch.results
    carried = {field.name for field, _ in result.ListFields()}
    allowed = {"sequence", "label", "score", "novelty", "token_count", "truncated", "event_time_us"}
    assert carried == allowed


async def test_with_no_field_listed_nothing_is_sent(tmp_path: Path) -> None:
    upstream = Upstream()
    here = site(tmp_path, Analyser(), upstream, export_fields=())
    await here.store.write(local_batch(0, 2))
    await until(lambda: here.publisher.position >= 0, "the publisher")
    await here.end()
    assert upstream.raw == b""


@pytest.mark.parametrize("trouble", ["dead", "hanging", "broken", "stopped"])
async def test_sealing_goes_on_while_the_engine_does_not(tmp_path: Path, trouble: str) -> None:
    analyser, upstream = Analyser(), Upstream()
    analyser.hang, analyser.stopped = trouble == "hanging", trouble == "stopped"
    analyser.error = {"dead": Retryable("not running"), "broken": RuntimeError("bug")}.get(trouble)
    here = site(tmp_path, analyser, upstream)
    for i in range(5):
        await here.store.write(local_batch(i * 2, 2))
    await until(lambda: here.log.events().count("sealed_follow_retried") >= 2, "two attempts")
    assert sum(f.rows for f in here.store.records.files()) == 10
    analyser.hang, analyser.stopped, analyser.error = False, False, None
    await until(lambda: sorted(upstream.sequences) == list(range(10)), "all results, once the engine is back")
    await here.end()


async def test_analysis_goes_on_while_upstream_is_away_and_all_is_sent_afterwards(tmp_path: Path) -> None:
    analyser, upstream = Analyser(), Upstream()
    upstream.error = Retryable("no broker")
    here = site(tmp_path, analyser, upstream)
    for i in range(6):
        await here.store.write(local_batch(i * 2, 2))
        await until(lambda i=i: here.raw_results() >= 2 * (i + 1), "results on the site")  # type: ignore[misc]
    assert upstream.sent == []
    upstream.error = None
    await until(lambda: sorted(upstream.sequences) == list(range(12)), "all results upstream")
    await here.end()


async def test_a_message_that_upstream_refuses_for_ever_does_not_hold_up_the_others(tmp_path: Path) -> None:
    upstream = Upstream()
    upstream.error = Permanent("too large")
    here = site(tmp_path, Analyser(), upstream)
    await here.store.write(local_batch(0, 2))
    await until(lambda: "site_refused" in here.log.events(), "the refusal")
    upstream.error = None
    await here.store.write(local_batch(2, 2))
    await until(lambda: 2 in upstream.sequences, "the next ones")
    await here.end()
    assert sorted(upstream.sequences) == [2, 3]


async def test_a_text_that_cannot_be_analysed_is_noted_on_the_site_and_not_sent(tmp_path: Path) -> None:
    upstream = Upstream()
    here = site(tmp_path, Analyser(), upstream)
    await here.store.write(local_batch(0, 1, text="bad"))
    await here.store.write(local_batch(1, 1))
    await until(lambda: upstream.sequences == [1], "the good one")
    await here.end()
    assert [(row["sequence"], row["error"]) for row in here.results()] == [(0, "unreadable"), (1, None)]


async def test_only_the_configured_streams_are_analysed(tmp_path: Path) -> None:
    analyser = Analyser()
    here = site(tmp_path, analyser, Upstream(), streams=("audit*",))
    await here.store.write(local_batch(0, 1))
    await here.store.write(local_batch(1, 1, stream="audit-2"))
    await until(lambda: here.raw_results() == 1, "one result")
    await here.end()
    assert analyser.seen == ["call bob@example.com 1"]


async def test_a_restart_continues_where_it_was(tmp_path: Path) -> None:
    analyser, upstream = Analyser(), Upstream()
    first = site(tmp_path, analyser, upstream)
    await first.store.write(local_batch(0, 6))
    await until(lambda: len(upstream.sequences) == 6, "first results")
    position = first.analysis.position
    await until(lambda: first.analysis.position > 0 and first.publisher.position > position, "places saved")
    await first.end()
    second = site(tmp_path, analyser, upstream)
    await second.store.write(local_batch(6, 2))
    await until(lambda: len(upstream.sequences) == 8, "the rest")
    await second.end()
    assert sorted(upstream.sequences) == list(range(8))
    assert len(analyser.seen) == 8


async def test_results_written_before_a_crash_are_not_made_again(tmp_path: Path) -> None:
    """The place was not saved, some of the results were."""
    analyser, upstream = Analyser(), Upstream()
    first = site(tmp_path, analyser, upstream)
    await first.store.write(local_batch(0, 6))
    await until(lambda: first.raw_results() == 6, "results")
    await first.end()
    (tmp_path / "sealed" / "analysis.json").unlink(missing_ok=True)
    second = site(tmp_path, analyser, upstream)
    await second.store.write(local_batch(6, 2))
    await until(lambda: second.raw_results() >= 8, "the new ones")
    await second.end()
    assert len(analyser.seen) == 8
    assert second.raw_results() == 8


async def test_a_damaged_sealed_file_does_not_stop_analysis(tmp_path: Path) -> None:
    settings = config(tmp_path, analysis=QUICK)
    store = open_store(settings)
    await store.write(local_batch(0, 1))
    await store.write(local_batch(1, 1))
    damaged = store.directory / "records" / store.records.files()[0].name
    await store.drain(1)
    damaged.write_bytes(b"PARE" + b"x" * 200 + b"PARE")
    upstream = Upstream()
    here = Site(settings, Analyser(), upstream)
    await until(lambda: upstream.sequences == [1], "the other file's result")
    await here.end()
    assert "sealed_follow_passed_over" in here.log.events()
    assert damaged.exists()


async def test_no_event_quotes_a_sealed_text(tmp_path: Path) -> None:
    analyser, upstream = Analyser(), Upstream()
    # Libraries quote what they choke on.
    analyser.error = ValueError("could not convert 'call bob@example.com 0'")
    here = site(tmp_path, analyser, upstream)
    await here.store.write(local_batch(0, 2))
    await until(lambda: "sealed_follow_retried" in here.log.events(), "a failure")
    await here.end()
    assert "bob" not in here.log.text
