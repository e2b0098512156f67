import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from central.analysis import Analysis
from central.analysis_batch import batches_of_results, read_texts
from central.config import AnalysisConfig
from central.filters import compile_globs
from central.offsets import OffsetTracker
from engine.lane import Priority
from engine.spans import Span
from protos import feed_pb2
from sluice.codec import Limits, encode
from sluice.connections import KafkaConfig
from sluice.errors import Backpressure, Permanent, Retryable
from sluice.kafka import KafkaWriter
from sluice.record import GapReason, Record
from sluice.telemetry import Telemetry
from tests.brokers.clients import consume
from tests.central import feed_support
from tests.central.feed_support import LIMITS, SILENT, SmallEngine, Topics, envelope, until
from tests.sluice.examples import SPOOL, batch_of


def results_in(topics: Topics) -> list[feed_pb2.ResultBatch]:
    """Everything in the results topic."""
    kafka = topics.kafka
    messages = [
        message
        for partition in range(topics.partitions)
        for message in consume(kafka.bootstrap_servers, kafka.results_topic, partition)
    ]
    return [feed_pb2.ResultBatch.FromString(message.value()) for message in messages]


def sequences_in(topics: Topics) -> list[int]:
    return [result.sequence for batch in results_in(topics) for result in batch.results]


@contextlib.asynccontextmanager
async def running(topics: Topics, engine: Any, **settings: Any) -> AsyncIterator[Analysis]:
    telemetry = Telemetry("central", SILENT)
    writer = KafkaWriter(topics.kafka, telemetry, client_id="test")
    # A group of this test's own; short intervals, so that a test sees a commit.
    config = AnalysisConfig(
        **({"group_id": topics.kafka.records_topic, "commit_interval_s": 0.05, "retry_delay_s_max": 0.1} | settings)
    )
    analysis = Analysis(config, topics.kafka, LIMITS, engine, writer, telemetry)
    task = asyncio.create_task(analysis.run())
    try:
        yield analysis
    finally:
        await analysis.drain(5.0)
        await writer.close(5.0)
        await asyncio.wait_for(task, 20)


def counted(analysis: Analysis, name: str, **labels: str) -> float:
    return analysis._telemetry.registry.get_sample_value(name, labels) or 0.0


async def published(analysis: Analysis, stream: str, count: int) -> None:
    await until(lambda: counted(analysis, "sluice_analysis_results_total", stream=stream) >= count, f"{count} results")


async def test_every_text_of_the_wanted_streams_gets_one_result_with_its_identity(topics: Topics) -> None:
    engine = SmallEngine()
    metrics = encode(batch_of(Record(1, metrics={"cpu": 1.0}), Record(2, text="warm-2"), first=90, stream="syslog"))
    receipt = encode(batch_of(Record(1, text="kept"), first=95, stream="syslog").receipt(GapReason.WITHHELD))
    topics.records(envelope(0, 30, stream="syslog"), envelope(30, 5, stream="host"), metrics.payload, receipt.payload)
    topics.records(envelope(40, 30, stream="syslog", site="s", device_id="d"), partition=1)
    async with running(topics, engine, streams=("sys*",), embed=True) as analysis:
        await published(analysis, "syslog", 61)
    batches = results_in(topics)
    assert sorted(r.sequence for b in batches for r in b.results) == [*range(30), *range(40, 70), 91]
    assert all(call[2] is Priority.BACKGROUND for call in engine.calls)
    one = next(b for b in batches if b.device_id == "d")
    assert (one.spool_id, one.site, one.stream, one.origin) == (SPOOL, "s", "syslog", feed_pb2.ORIGIN_CLOUD)
    assert (one.task, one.model, one.model_version) == ("classify", "small", "1")
    row = one.results[0]
    assert (row.label, row.score, row.event_time_us, row.embedding) == ("line", 0.75, 40, b"\x00\x3c")


async def test_bad_envelopes_and_bad_texts_are_counted_and_stop_nothing(topics: Topics) -> None:
    engine = SmallEngine()
    engine.raises["refused-20"] = Permanent("no such task")
    topics.records(b"\xff garbage", envelope(0, 3, text="bad"), envelope(20, 1, text="refused"), envelope(30, 2))
    async with running(topics, engine) as analysis:
        await published(analysis, "host", 2)
        assert counted(analysis, "sluice_analysis_text_failed_texts_total") == 3
        assert counted(analysis, "sluice_analysis_envelope_skipped_envelopes_total", reason="undecodable") == 1
        assert counted(analysis, "sluice_analysis_envelope_skipped_envelopes_total", reason="refused") == 1
    assert sequences_in(topics) == [30, 31]


@pytest.mark.parametrize("trouble", [Backpressure("full", retry_after_s=0.01), Retryable("away")])
async def test_an_engine_in_trouble_is_waited_for(topics: Topics, trouble: Exception) -> None:
    engine = SmallEngine()
    engine.raises["line-0"] = trouble
    topics.records(envelope(0, 1), envelope(1, 1))
    async with running(topics, engine) as analysis:
        await published(analysis, "host", 1)
        await until(lambda: len(engine.calls) > 5, "it is tried again and again")
        engine.raises.clear()
        await published(analysis, "host", 2)
    assert sorted(sequences_in(topics)) == [0, 1]


async def test_an_engine_that_stops_with_texts_under_way_loses_none_of_their_results(topics: Topics) -> None:
    engine = SmallEngine()
    engine.fails["line-1"] = feed_support.Analysis(error="its compute thread died", reason="stopped")
    topics.records(envelope(0, 3))
    async with running(topics, engine) as analysis:
        await until(lambda: len(engine.calls) > 2, "it is tried again")
        assert sequences_in(topics) == []
        engine.fails.clear()
        await published(analysis, "host", 3)
        assert counted(analysis, "sluice_analysis_text_failed_texts_total") == 0
    assert sequences_in(topics) == [0, 1, 2]


async def test_what_is_in_flight_is_bounded_and_the_engine_has_several_envelopes_at_once(topics: Topics) -> None:
    engine = SmallEngine()
    engine.gate.clear()
    topics.records(*(envelope(i * 10, 10) for i in range(20)))
    async with running(topics, engine, in_flight_envelopes_max=3) as analysis:
        await until(lambda: engine.waiting == 3, "three envelopes are in the engine")
        for _ in range(50):
            await asyncio.sleep(0)
        assert engine.waiting == 3
        engine.gate.set()
        await published(analysis, "host", 200)
    assert sorted(sequences_in(topics)) == list(range(200))


async def test_a_stalled_engine_does_not_cost_the_membership(topics: Topics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("central.analysis.PAUSE_AFTER_S", 0.05)
    monkeypatch.setattr("central.analysis.POLL_S", 0.05)
    engine = SmallEngine()
    engine.gate.clear()
    topics.records(*(envelope(i * 10, 10) for i in range(20)))
    async with running(topics, engine, in_flight_texts_max=15) as analysis:
        await until(lambda: engine.waiting == 2, "no room is left")
        polls = []
        thread = analysis._on_thread

        async def counting(work: Any) -> Any:
            polls.append(work)
            return await thread(work)

        analysis._on_thread = counting  # type: ignore[method-assign]
        await until(lambda: len(polls) > 10, "the consumer is polled on")
        assert engine.waiting == 2, "paused partitions give nothing"
        engine.gate.set()
        await published(analysis, "host", 200)
    assert sorted(sequences_in(topics)) == list(range(200))


async def test_after_a_clean_end_nothing_is_done_twice(topics: Topics) -> None:
    for round_number in range(2):
        topics.records(envelope(round_number * 10, 10), partition=round_number)
        async with running(topics, SmallEngine()) as analysis:
            await published(analysis, "host", 10)
    assert sorted(sequences_in(topics)) == list(range(20))


async def test_drain_leaves_what_a_stuck_engine_does_not_finish_for_the_next_start(topics: Topics) -> None:
    engine = SmallEngine()
    topics.records(envelope(0, 10))
    async with running(topics, engine) as analysis:
        await published(analysis, "host", 10)
        engine.gate.clear()
        topics.records(envelope(10, 10))
        await until(lambda: engine.waiting == 1, "the second is in the engine")
        await analysis.drain(2.0)
        assert engine.cancelled == 1
    async with running(topics, SmallEngine()) as analysis:
        await published(analysis, "host", 10)
    assert sorted(sequences_in(topics)) == list(range(20))


KILLED = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.central.test_analysis import run_until_killed
asyncio.run(run_until_killed(*sys.argv[2:]))
"""


async def run_until_killed(encoded_kafka: str) -> None:
    """Analyses, says when some results were written, and stalls."""
    kafka = msgspec.json.decode(encoded_kafka, type=KafkaConfig)
    telemetry = Telemetry("central", SILENT)
    writer = KafkaWriter(kafka, telemetry, client_id="test")
    engine = SmallEngine()
    config = AnalysisConfig(group_id=kafka.records_topic, commit_interval_s=0.05, in_flight_envelopes_max=3)
    analysis = Analysis(config, kafka, LIMITS, engine, writer, telemetry)
    running = asyncio.create_task(analysis.run())
    await published(analysis, "host", 50)
    engine.gate.clear()
    print("some", flush=True)
    await running


async def test_killed_in_mid_flow_no_result_is_missing_after_the_restart(topics: Topics) -> None:
    root = str(Path(feed_support.__file__).parents[2])
    command = [sys.executable, "-c", KILLED, root, msgspec.json.encode(topics.kafka).decode()]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, cwd=root)
    assert process.stdout is not None
    topics.records(*(envelope(i * 5, 5) for i in range(200)))
    assert await asyncio.wait_for(process.stdout.readline(), 20) == b"some\n"
    process.kill()
    await process.wait()
    before = sequences_in(topics)
    assert before
    async with running(topics, SmallEngine()) as analysis:
        missing = 1000 - len(set(before))
        assert missing > 0, "it was killed in mid-flow"
        await published(analysis, "host", missing)
        async with asyncio.timeout(20):
            while set(await asyncio.to_thread(sequences_in, topics)) != set(range(1000)):
                pass


@given(st.lists(st.integers(1, 3), min_size=1, max_size=40), st.data())
def test_nothing_unfinished_lies_below_what_may_be_committed(steps: list[int], data: st.DataObject) -> None:
    tracker = OffsetTracker()
    offsets = [sum(steps[: i + 1]) for i in range(len(steps))]
    begun: list[int] = []
    unfinished: list[int] = []
    while len(begun) < len(offsets) or unfinished:
        if len(begun) < len(offsets) and (not unfinished or data.draw(st.booleans())):
            offset = offsets[len(begun)]
            tracker.begin(offset)
            begun.append(offset)
            unfinished.append(offset)
        else:
            offset = data.draw(st.sampled_from(unfinished))
            unfinished.remove(offset)
            tracker.finish(offset)
        finished_prefix = [o for o in begun if not unfinished or o < unfinished[0]]
        assert tracker.committable == (finished_prefix[-1] + 1 if finished_prefix else None)
    assert tracker.in_flight == 0


def test_results_are_cut_into_messages_of_bounded_size() -> None:
    texts = read_texts(envelope(0, 100), Limits(), compile_globs("streams", ()))
    assert texts is not None
    analyses = [feed_support.Analysis(label="x" * 90) for _ in range(100)]
    analyses[7] = feed_support.Analysis(error="no")
    said = {"task": "t", "created_time_us": 1, "bytes_max": 1000}
    batches = list(batches_of_results(texts, analyses, **said))
    assert [r.sequence for b in batches for r in b.results] == [i for i in range(100) if i != 7]
    assert len(batches) > 5
    assert all(batch.ByteSize() < 1300 for batch in batches)


def test_spans_of_a_text_are_in_its_result() -> None:
    texts = read_texts(envelope(0, 1), Limits(), compile_globs("streams", ()))
    assert texts is not None
    spans = (Span(0, 3, "PER", 0.5), Span(8, 11, "LOC", 0.25))
    said = {"task": "tokens", "created_time_us": 1, "bytes_max": 1000}
    (batch,) = batches_of_results(texts, [feed_support.Analysis("PER", 0.5, spans=spans)], **said)
    (result,) = feed_pb2.ResultBatch.FromString(batch.SerializeToString()).results
    assert [Span(s.start, s.end, s.label, s.score) for s in result.spans] == list(spans)
