import asyncio
import contextlib
import json
import os
import re
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
        shown = run(analyze, [*base, "--task", "novelty", "fine-1"])
        assert "--stream" in str(shown.exception), "without a stream there is nothing to compare with"
        shown = run(analyze, [*base, "--task", "novelty", "--stream", "syslog", "--embed", "fine-1"])
        assert shown.stdout == "novelty 0.25  embedding of 1 numbers (--json shows them)  fine-1\n"


def test_a_bad_line_of_a_file_is_named_and_the_others_are_answered(topics: Topics, tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    bad = [b"\xff\xfe binary", b"\xed\xa0\x80 a lone surrogate", b"x" * 3_000_000]
    good = [b"one-1", b"nul-\0", "zwölf-12".encode(), b"y" * 1_000_000, b"last-9"]
    file.write_bytes(b"\n".join([good[0], bad[0], b"", good[1], bad[1], good[2], bad[2], good[3], b"\r", good[4]]))
    with feed_thread(topics, tmp_path, SmallEngine()) as feed:
        run = CliRunner().invoke
        shown = run(analyze, ["--target", feed.target, "--file", str(file), "--json"])
        answers = [json.loads(line) for line in shown.stdout.splitlines()]
        assert shown.exit_code == 1
        assert [(answer["line"], "error" in answer) for answer in answers] == [
            (1, False),
            (2, True),
            (4, False),
            (5, True),
            (6, False),
            (7, True),
            (8, False),
            (10, False),
        ]
        assert answers[1]["text"] == "\\udcff\\udcfe binary"
        assert "exceeds" in answers[5]["error"]
        assert shown.stderr == "3 of 8 texts have no result\n", "no bar where there is no terminal"
        shown = run(analyze, ["--target", feed.target, "--file", "-"], input=file.read_bytes())
        assert shown.exit_code == 1
        assert "line 5: invalid  not valid Unicode at position 0" in shown.stdout
        shown = run(analyze, ["--target", feed.target, "first-0", "--file", "-", "--json"], input=b"\nsecond-1\n")
        assert [json.loads(line).get("line") for line in shown.stdout.splitlines()] == [None, 2]
        shown = run(analyze, ["--target", feed.target, "--file", str(tmp_path / "none.txt")])
        assert (shown.exit_code, "No such file" in shown.stderr) == (2, True)


def test_a_file_shows_how_far_it_is_where_there_is_a_terminal(topics: Topics, tmp_path: Path) -> None:
    file, out = tmp_path / "lines.txt", tmp_path / "out.txt"
    file.write_text("".join(f"line-{i}\n" for i in range(2000)))
    main, terminal = os.openpty()
    with feed_thread(topics, tmp_path, SmallEngine()) as feed, out.open("wb") as results:
        program = "import sys; from sluice.client.cli import analyze; analyze(sys.argv[1:])"
        arguments = ["--target", feed.target, "--file", str(file)]
        command = [sys.executable, "-c", program, *arguments]
        process = subprocess.Popen(command, stdout=results, stderr=terminal, cwd=Path(__file__).parents[2])
        os.close(terminal)
        shown = _read_all(main)
        assert process.wait(60) == 0, shown
    assert re.search(r"\r\x1b\[K\[#+-+\] +\d+%  \d+:\d\d left  [\d,]+ texts \([\d,]+/s\)", shown), shown[:500]
    assert shown.endswith("\r\x1b[K")
    assert out.read_text().count("\n") == 2000


def _read_all(descriptor: int) -> str:
    content = b""
    with contextlib.suppress(OSError):  # Linux says EIO when the other side is closed
        while piece := os.read(descriptor, 1 << 16):
            content += piece
    os.close(descriptor)
    return content.decode()


async def test_the_asyncio_client_answers_what_cannot_be_sent_too(topics: Topics, tmp_path: Path) -> None:
    async with running_feed(topics, tmp_path, SmallEngine()) as (_, target), connect_async(target) as client:
        texts = ["one-1", *["\ud800"] * 100, "two-2"]
        answers = [answer async for answer in client.analyze(texts)]
    assert [answer.text for answer in answers] == texts
    assert [answer.error_code for answer in answers] == ["", *["invalid"] * 100, ""]


def test_the_client_needs_neither_torch_nor_kafka_and_grpc_only_when_used() -> None:
    code = (
        "import sys; import sluice.client, sluice.client.cli; "
        "assert not {'grpc', 'torch', 'confluent_kafka', 'pyarrow'} & sys.modules.keys(); "
        "import sluice.client.sync, sluice.client.aio; "
        "assert not {'torch', 'confluent_kafka', 'pyarrow', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
