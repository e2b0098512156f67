"""The other sources: the generator resumes where the spool says, stdin takes what is a record, host measures."""

import io
import json

import pytest

from edge.config import GeneratorConfig, HostConfig, StdinConfig
from edge.sources.generator import GeneratorSource
from edge.sources.host import HostSource
from edge.sources.stdin import StdinSource
from tests.edge.source_examples import Bench


async def test_the_generator_makes_each_index_once_through_a_restart() -> None:
    bench = Bench()
    config = GeneratorConfig(rate_per_s=100_000, count=500, text_bytes=20)
    await bench.run(GeneratorSource(config, bench.context), lambda: len(bench.records) >= 100)
    assert len(bench.records) >= 100
    await bench.run(GeneratorSource(config, bench.context))
    assert [record.metrics["index"] for record in bench.records] == list(range(500))
    assert all(len(record.text) == 20 for record in bench.records)


async def test_the_same_seed_makes_the_same_texts() -> None:
    texts = []
    for seed in (1, 1, 2):
        bench = Bench()
        await bench.run(GeneratorSource(GeneratorConfig(rate_per_s=1e6, count=5, seed=seed), bench.context))
        texts.append(bench.texts)
    assert texts[0] == texts[1] != texts[2]


async def test_the_generator_keeps_its_rate() -> None:
    import asyncio

    bench = Bench()
    loop = asyncio.get_running_loop()
    started = loop.time()
    await bench.run(GeneratorSource(GeneratorConfig(rate_per_s=200, count=60), bench.context))
    assert 0.2 <= loop.time() - started < 3


async def read_stdin(content: bytes, bench: Bench, **settings: str) -> None:
    await bench.run(StdinSource(StdinConfig(**settings), bench.context, io.BufferedReader(io.BytesIO(content))))  # type: ignore[arg-type]


async def test_lines_of_stdin_become_texts() -> None:
    bench = Bench()
    await read_stdin(b"one\r\ntwo\n\nfour", bench)
    assert bench.texts == ["one", "two", "", "four"]


async def test_json_lines_become_records_and_what_is_none_is_counted() -> None:
    bench = Bench()
    good = {"text": "t", "metrics": {"m": 1}, "labels": {"l": "v"}, "event_time_us": 7}
    lines = [json.dumps(good), "{", '{"txt": 1}', '{"metrics": {"m": "secret"}}', "{}"]
    await read_stdin("\n".join(lines).encode(), bench, format="json")
    assert len(bench.records) == 2
    first = bench.records[0]
    assert (first.text, first.metrics, first.labels, first.event_time_us) == ("t", {"m": 1.0}, {"l": "v"}, 7)
    refused = [event for event in bench.events() if event["event"] == "stdin_line_refused"]
    assert [event["line"] for event in refused] == [2, 3, 4]
    assert "secret" not in bench.log.getvalue()


@pytest.mark.parametrize("length", [101, 1_000_000, 3_000_000])
async def test_a_line_beyond_the_limits_is_refused_and_the_next_one_taken(length: int) -> None:
    bench = Bench(text_bytes_max=100)
    await read_stdin(b"before\n" + b"x" * length + b"\nafter\n", bench)
    assert bench.texts == ["before", "after"]
    (refused,) = [event for event in bench.events() if event["event"] == "record_refused"]
    assert refused["line"] == 2
    assert refused["reason"] in {"text_bytes", "envelope_bytes"}


async def test_the_host_is_measured() -> None:
    bench = Bench()
    await bench.run(HostSource(HostConfig(interval_s=0.01), bench.context), lambda: len(bench.records) > 20)
    groups = {record.labels["group"] for record in bench.records}
    assert {"cpu", "memory", "disk", "network"} <= groups
    memory = next(record.metrics for record in bench.records if record.labels["group"] == "memory")
    assert 0 < memory["available_bytes"] <= memory["total_bytes"]
    disk = next(record for record in bench.records if record.labels.get("mount") == "/")
    assert disk.metrics["total_bytes"] > 0


async def test_a_payload_in_a_line_of_json_is_base64() -> None:
    bench = Bench()
    await read_stdin(b'{"payload": "AP8=", "content_type": "application/octet-stream"}', bench, format="json")
    assert (bench.records[0].payload, bench.records[0].content_type) == (b"\0\xff", "application/octet-stream")
