import asyncio
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from sluice.client import RecordItem, ResultItem, connect, connect_async
from sluice.client.cli import analyze, tail
from sluice.errors import Backpressure, Permanent, Retryable
from tests.central.feed_support import SmallEngine, Topics, envelope, results, running_feed
from tests.client.feed_thread import feed_thread
from tests.sluice.examples import SPOOL


def test_records_and_results_come_typed_with_their_identity(topics: Topics, tmp_path: Path) -> None:
    topics.records(envelope(3, 1, stream="syslog", site="north", device_id="pi", received_time_us=9))
    topics.results(results(3, ["disk"], [0.5], model="m", origin=1))
    with feed_thread(topics, tmp_path) as feed, connect(feed.target) as client:
        found = {}
        for item in client.subscribe(start="earliest"):
            found[type(item)] = item
            if len(found) == 2:
                break
    record, result = found[RecordItem], found[ResultItem]
    assert (record.device_id, record.spool_id, record.sequence, record.site) == ("pi", SPOOL, 3, "north")
    assert (record.received_time_us, record.record.text) == (9, "line-3")
    assert (result.sequence, result.label, result.score, result.origin, result.model) == (3, "disk", 0.5, "site", "m")


def test_a_restart_of_the_server_is_neither_gap_nor_repeat(topics: Topics, tmp_path: Path) -> None:
    with feed_thread(topics, tmp_path) as feed, connect(feed.target) as client:
        subscription = client.subscribe(kinds=["records"], start="earliest")
        seen: list[int] = []
        enough = [threading.Event() for _ in range(3)]

        def read() -> None:
            for item in subscription:
                seen.append(item.sequence)
                for count, event in zip((50, 100, 150), enough, strict=True):
                    if len(seen) >= count:
                        event.set()

        reader = threading.Thread(target=read)
        reader.start()
        for round_number, event in enumerate(enough):
            topics.records(*(envelope(round_number * 50 + i, 1) for i in range(25)))
            if round_number:
                feed.stop()
            topics.records(*(envelope(round_number * 50 + 25 + i, 1) for i in range(25)))
            if round_number:
                feed.start()
            assert event.wait(20), f"{len(seen)} records"
        subscription.close()
        reader.join(10)
    assert seen == list(range(150))
    assert subscription.resume_token


def test_another_process_goes_on_with_the_token(topics: Topics, tmp_path: Path) -> None:
    topics.records(*(envelope(i * 10, 10) for i in range(10)))
    with feed_thread(topics, tmp_path) as feed:
        with connect(feed.target) as client:
            batches = client.subscribe(start="earliest").batches()
            first = [next(batches) for _ in range(4)]
        with connect(feed.target) as client:
            batches = client.subscribe(resume_token=first[-1].resume_token).batches()
            second = [next(batches) for _ in range(6)]
    assert [i.sequence for batch in first + second for i in batch.items] == list(range(100))


def test_a_refused_subscription_and_an_outage_that_lasts_are_errors(topics: Topics, tmp_path: Path) -> None:
    with feed_thread(topics, tmp_path) as feed, connect(feed.target) as client:
        with pytest.raises(Permanent, match="resume token"):
            next(iter(client.subscribe(resume_token=b"forged" * 20)))
        feed.stop()
        waits: list[str] = []
        subscription = client.subscribe(outage_s_max=0.3, on_wait=lambda why, _: waits.append(why))
        with pytest.raises(Retryable, match="no connection"):
            next(iter(subscription))
        assert waits
        assert "UNAVAILABLE" in waits[0]


def test_answers_come_in_order_and_an_overload_is_ridden_out(topics: Topics, tmp_path: Path) -> None:
    engine = SmallEngine()
    engine.raises["text-5"] = Backpressure("full", retry_after_s=0.02)
    with feed_thread(topics, tmp_path, engine) as feed, connect(feed.target) as client:
        threading.Timer(0.1, engine.raises.clear).start()
        answers = list(client.analyze([*(f"text-{i}" for i in range(100)), "bad"], embed=True))
        assert [a.text for a in answers] == [*(f"text-{i}" for i in range(100)), "bad"]
        assert all(a.label == "text" and a.embedding for a in answers[:-1])
        assert answers[-1].error_code == "invalid"
        assert list(client.analyze([])) == []
        feed.stop()
        with pytest.raises(Retryable, match="UNAVAILABLE"):
            list(client.analyze(["x"]))


async def test_the_asyncio_client_does_the_same(topics: Topics, tmp_path: Path) -> None:
    engine = SmallEngine()
    topics.records(*(envelope(i, 1) for i in range(30)))
    async with running_feed(topics, tmp_path, engine) as (feed, target):
        port = int(target.rpartition(":")[2])
        async with connect_async(target) as client:
            assert [a.label async for a in client.analyze(["one-1", "two-2"])] == ["one", "two"]
            subscription = client.subscribe(kinds=["records"], start="earliest")
            seen = []
            async for item in subscription:
                seen.append(item.sequence)
                if len(seen) == 30:
                    break
            with pytest.raises(Permanent, match="resume token"):
                await anext(client.subscribe(resume_token=b"forged" * 20).batches())
        await feed.drain(5.0)
        topics.records(*(envelope(30 + i, 1) for i in range(30)))
        async with connect_async(target) as client:
            following = client.subscribe(kinds=["records"], resume_token=subscription.resume_token)
            reading = asyncio.create_task(_take(following, 30 + (30 - len(seen))))
            async with running_feed(topics, tmp_path, port=port):
                again = await asyncio.wait_for(reading, 20)
    # The token covers whole batches that were read to their end; each is one record here, and the last was being read.
    assert sorted({*seen, *again}) == list(range(60))
    assert len(again) <= 31


async def _take(subscription, count: int) -> list[int]:
    found: list[int] = []
    async for item in subscription:
        found.append(item.sequence)
        if item.sequence == 59:
            subscription.close()
    return found


def test_tail_prints_a_line_per_item_and_where_to_continue(topics: Topics, tmp_path: Path) -> None:
    topics.records(envelope(0, 3, stream="syslog"), envelope(3, 3, stream="host"))
    topics.results(results(0, ["disk"], [0.9], stream="syslog"))
    with feed_thread(topics, tmp_path) as feed:
        run = CliRunner().invoke
        base = ["--target", feed.target, "--from", "earliest"]
        shown = run(tail, [*base, "--kinds", "records", "--stream", "sys*", "--limit", "3"])
        assert shown.exit_code == 0, shown.output
        assert shown.stdout.count("line-") == 3
        assert "\x1b" not in shown.stdout, "no colour where there is no terminal"
        assert "continue with --from" in shown.stderr
        shown = run(tail, [*base, "--kinds", "results", "--json", "--timeout", "0.5"])
        assert [json.loads(line)["label"] for line in shown.stdout.splitlines()] == ["disk"]
        token = run(tail, [*base, "--timeout", "0.5"]).stderr.split()[-1]
        topics.records(envelope(6, 1))
        shown = run(tail, ["--target", feed.target, "--from", token, "--json", "--limit", "1"])
        assert json.loads(shown.stdout)["sequence"] == 6


def test_analyze_answers_arguments_and_files_and_fails_when_one_has_no_answer(topics: Topics, tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("one-1\n\ntwo-2\n")
    with feed_thread(topics, tmp_path, SmallEngine()) as feed:
        run = CliRunner().invoke
        base = ["--target", feed.target]
        shown = run(analyze, [*base, "--file", str(file), "--json"])
        assert shown.exit_code == 0, shown.output
        assert [json.loads(line)["label"] for line in shown.stdout.splitlines()] == ["one", "two"]
        shown = run(analyze, [*base, "fine-1", "bad text"])
        assert shown.exit_code == 1
        assert "fine 0.75" in shown.stdout
        assert "invalid" in shown.stdout


def test_the_client_needs_neither_torch_nor_kafka_and_grpc_only_when_used() -> None:
    code = (
        "import sys; import sluice.client, sluice.client.cli; "
        "assert not {'grpc', 'torch', 'confluent_kafka', 'pyarrow'} & sys.modules.keys(); "
        "import sluice.client.sync, sluice.client.aio; "
        "assert not {'torch', 'confluent_kafka', 'pyarrow', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
