"""The engine as its callers see it, on a fake device."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config import CacheConfig, EngineConfig
from engine.service import Analysis, Engine, Priority
from sluice.errors import Backpressure, Permanent, Retryable
from sluice.telemetry import Telemetry
from tests.engine.fakes import FakeBackend, embedding, fake_loader

NO_CACHES = CacheConfig(token_bytes_max=0, result_bytes_max=0)
Open = Callable[..., Any]


def texts(count: int, start: int = 0) -> list[str]:
    return [f"text {i}" for i in range(start, start + count)]


def right(analysis: Analysis, text: str) -> bool:
    ids = [0, *_byte_ids(text), 1]
    return analysis.embedding == embedding(ids).astype("<f2").tobytes()


def _byte_ids(text: str) -> list[int]:
    from tests.engine.fakes import byte_tokenizer

    return byte_tokenizer().encode([text])[0].ids[1:-1].tolist()  # type: ignore[no-any-return]


async def gated(open_engine: Open, config: EngineConfig | None = None) -> tuple[Engine, FakeBackend, threading.Event]:
    """An engine whose device waits at a gate."""
    gate = threading.Event()
    backend = FakeBackend(gate=gate)
    return await open_engine(config or EngineConfig(), loader=fake_loader(backend)), backend, gate


def written(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - figures of the engine have no event to wait on
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("caches", [CacheConfig(), NO_CACHES])
async def test_every_text_gets_its_own_result_in_order(open_engine: Open, caches: CacheConfig) -> None:
    engine = await open_engine(EngineConfig(caches=caches, chunk_texts=16), loader=fake_loader(FakeBackend()))
    wanted = [*texts(50), *texts(20), "x"]
    for _ in range(2):
        got = await engine.analyze(wanted, task="embed", stream="s")
        assert all(right(analysis, text) for analysis, text in zip(got, wanted, strict=True))
        assert [each.token_count for each in got] == [len(text) + 2 for text in wanted]
    assert await engine.analyze([]) == []


async def test_bad_texts_fail_alone(open_engine: Open) -> None:
    engine = await open_engine(EngineConfig(text_bytes_max=100), loader=fake_loader(FakeBackend()))
    hostile = ["good", "", "  ", "a\ud800", "x" * 101, "\x00\x1b[31m\x7f", "y" * 80, None, "\U0010ffff"]
    got = await engine.analyze(hostile, task="embed")
    errors = [each.error for each in got]
    assert [i for i, error in enumerate(errors) if error is None] == [0, 5, 6, 8]
    assert ["empty" in str(errors[i]) for i in (1, 2)] == [True, True]
    assert "surrogate" in str(errors[3])
    assert "engine.text_bytes_max" in str(errors[4])
    assert "NoneType" in str(errors[7])
    assert right(got[0], "good")
    assert [each.truncated for each in got] == [False] * 6 + [True, False, False]
    assert got[6].token_count == 64
    stats = engine.stats()
    assert (stats.texts_failed, stats.texts_truncated) == (5, 1)


async def test_thousands_of_distinct_lengths_run(open_engine: Open) -> None:
    backend = FakeBackend(length_max=512)
    engine = await open_engine(EngineConfig(), loader=fake_loader(backend, batch_tokens=2048))
    got = await engine.analyze(["z" * length for length in range(1, 2000)])
    assert all(each.error is None for each in got)
    assert max(count * length for count, length in backend.batches) <= 2048


async def test_identical_texts_are_computed_once_also_while_under_way(open_engine: Open) -> None:
    engine, backend, gate = await gated(open_engine)
    calls = [asyncio.create_task(engine.analyze(["same"] * 5, task="embed")) for _ in range(4)]
    await until(lambda: engine.stats().texts_coalesced == 19)
    gate.set()
    for call in calls:
        assert all(right(each, "same") for each in await call)
    assert sum(count for count, _ in backend.batches) == 1
    again = await engine.analyze(["same"], task="classify", embed=True)
    assert right(again[0], "same")
    assert engine.stats().result_cache_hits >= 1
    assert sum(count for count, _ in backend.batches) == 1


async def test_a_stream_can_be_kept_out_of_the_caches(open_engine: Open, tmp_path: Path) -> None:
    caches = CacheConfig(directory=str(tmp_path / "caches"), skip_streams=("secret",))
    backend = FakeBackend()
    engine = await open_engine(EngineConfig(caches=caches), loader=fake_loader(backend))
    for _ in range(2):
        await engine.analyze(["my secret"], stream="secret")
        await engine.analyze(["known to all"], stream="open")
    assert sum(count for count, _ in backend.batches) == 3
    await engine.drain(10)
    content = written(tmp_path / "caches")
    ids = [bytes([i % 256, i // 256]) for i in _byte_ids("my secret")]
    assert b"".join(ids) not in content
    ids = [bytes([i % 256, i // 256]) for i in _byte_ids("known to all")]
    assert b"".join(ids) in content


async def test_without_a_directory_nothing_is_written(
    open_engine: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    engine = await open_engine(EngineConfig(), loader=fake_loader(FakeBackend()))
    await engine.analyze(texts(100))
    await engine.drain(10)
    assert written(tmp_path) == b""


async def test_a_cancelled_call_drops_what_waits_and_disturbs_nobody(open_engine: Open) -> None:
    engine, backend, gate = await gated(open_engine, EngineConfig(batch_tokens=64))
    first = asyncio.create_task(engine.analyze(["running"], task="embed"))
    await until(backend.started.is_set)
    doomed = asyncio.create_task(engine.analyze([*texts(20), "shared"]))
    sharing = asyncio.create_task(engine.analyze(["shared"], task="embed"))
    await until(lambda: engine.stats().texts_coalesced == 1)
    doomed.cancel()
    with pytest.raises(asyncio.CancelledError):
        await doomed
    assert engine.stats().queue_tokens == len("shared") + 2
    gate.set()
    assert right((await first)[0], "running")
    assert right((await sharing)[0], "shared")
    assert sum(count for count, _ in backend.batches) == 2


async def test_a_passed_deadline_is_an_error_of_the_text_and_costs_no_compute(open_engine: Open) -> None:
    engine, backend, gate = await gated(open_engine, EngineConfig(batch_tokens=64))
    first = asyncio.create_task(engine.analyze(["running"]))
    await until(backend.started.is_set)
    late = await engine.analyze(texts(3), deadline_s=0.05)
    assert ["deadline" in str(each.error) for each in late] == [True] * 3
    gate.set()
    assert (await first)[0].error is None
    assert engine.stats().texts_expired == 3
    assert sum(count for count, _ in backend.batches) == 1
    assert (await engine.analyze(["in time"], deadline_s=30.0))[0].error is None


async def test_a_full_queue_gives_back_pressure_and_online_calls_have_a_share(open_engine: Open) -> None:
    engine, backend, gate = await gated(open_engine, EngineConfig(queue_tokens_max=1000, batch_tokens=64))
    running = asyncio.create_task(engine.analyze(["running"]))
    await until(backend.started.is_set)
    waiting = asyncio.create_task(engine.analyze([*texts(84), "xx"]))
    await until(lambda: engine.stats().queue_tokens == 750)
    with pytest.raises(Backpressure) as full:
        await engine.analyze(texts(30, start=100))
    assert full.value.retry_after_s > 0
    assert engine.stats().queue_tokens == 750
    online = asyncio.create_task(engine.analyze(texts(10, start=200), priority=Priority.ONLINE))
    await until(lambda: engine.stats().queue_tokens > 750)
    gate.set()
    for call in (running, waiting, online):
        assert [each.error for each in await call if each.error] == []


async def test_a_large_call_gets_its_turn_while_small_ones_take_all_the_room(open_engine: Open) -> None:
    engine, backend, gate = await gated(
        open_engine, EngineConfig(queue_tokens_max=1000, batch_tokens=64, calls_in_line_max=1)
    )
    running = asyncio.create_task(engine.analyze(["running"]))
    await until(backend.started.is_set)
    small = [asyncio.create_task(engine.analyze([text])) for text in texts(70)]
    await until(lambda: engine.stats().queue_tokens > 600)
    # Beside them there is room for some of its texts only, and whoever is small would always find some first.
    large = asyncio.create_task(engine.analyze(many := texts(30, start=100), task="embed"))
    await until(lambda: any(engine._models["default"].session.flights._lines.values()))
    with pytest.raises(Backpressure, match="calls_in_line_max"):
        await engine.analyze(["late and small"])
    gate.set()
    assert all(right(analysis, text) for analysis, text in zip(await large, many, strict=True))
    assert not [call for call in small if (await call)[0].error]
    await running


async def test_a_call_larger_than_the_queue_is_fed_piece_by_piece(open_engine: Open) -> None:
    config = EngineConfig(queue_tokens_max=300, chunk_texts=8, caches=NO_CACHES)
    engine = await open_engine(config, loader=fake_loader(FakeBackend()))
    many = texts(500)
    got = await engine.analyze(many, task="embed")
    assert all(right(analysis, text) for analysis, text in zip(got, many, strict=True))


async def test_a_text_that_breaks_the_device_fails_alone(open_engine: Open) -> None:
    backend = FakeBackend(poison=_byte_ids("~")[0])
    engine = await open_engine(EngineConfig(), loader=fake_loader(backend))
    got = await engine.analyze([*texts(20), "bad ~", *texts(20, start=20)], task="embed")
    assert [i for i, each in enumerate(got) if each.error] == [20]
    assert "inference failed" in str(got[20].error)


async def test_when_the_compute_thread_dies_everyone_is_told(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, backend, gate = await gated(open_engine)

    def crash(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("engine.driver.Driver._finish", crash)
    gate.set()
    (got,) = await engine.analyze(["text"])
    assert "compute thread died" in str(got.error)
    assert not engine.ready
    with pytest.raises(Retryable, match="a bug"):
        await engine.analyze(["text"])
    await until(lambda: backend.closed)


async def test_drain_lets_work_end_and_refuses_new_calls(open_engine: Open) -> None:
    engine, backend, gate = await gated(open_engine)
    running = asyncio.create_task(engine.analyze(["running"], task="embed"))
    await until(backend.started.is_set)
    draining = asyncio.create_task(engine.drain(20))
    await until(lambda: not engine.ready)
    with pytest.raises(Retryable, match="draining"):
        await engine.analyze(["new"])
    gate.set()
    assert right((await running)[0], "running")
    await draining
    assert backend.closed
    await engine.drain(1)
    await engine.close()


async def test_what_is_left_at_the_drains_deadline_gets_an_error(open_engine: Open) -> None:
    engine, backend, gate = await gated(open_engine, EngineConfig(batch_tokens=16))
    running = asyncio.create_task(engine.analyze(texts(10)))
    await until(backend.started.is_set)
    asyncio.get_running_loop().call_later(0.2, gate.set)
    await engine.drain(0.05)
    errors = [each.error for each in await running]
    assert errors.count(None) >= 1
    assert "the engine stopped" in errors


async def test_close_before_start_and_a_failed_start_leave_nothing_behind(telemetry: Telemetry) -> None:
    engine = Engine(EngineConfig(), telemetry)
    with pytest.raises(Retryable, match="not started"):
        await engine.analyze(["text"])
    await engine.drain(1)
    await engine.close()
    await engine.start()
    assert not engine.ready


async def test_a_model_that_is_not_there_fails_the_start_with_the_way_out(telemetry: Telemetry) -> None:
    engine = Engine(EngineConfig(model="no-such-model"), telemetry)
    with pytest.raises(Permanent, match="allow_download"):
        await engine.start()
    await engine.close()


async def test_an_unknown_task_is_refused(open_engine: Open) -> None:
    engine = await open_engine(loader=fake_loader(FakeBackend()))
    with pytest.raises(Permanent, match="'translate'"):
        await engine.analyze(["text"], task="translate")


async def test_novelty_is_kept_per_stream_and_can_be_the_score(open_engine: Open) -> None:
    engine = await open_engine(loader=fake_loader(FakeBackend()))
    await engine.analyze(["heartbeat ok"] * 200, stream="s")
    usual, new = await engine.analyze(["heartbeat ok", "qqqqqqqqqqq"], stream="s", task="novelty")
    assert usual.novelty < 0.05
    assert new.novelty == new.score > 0.3
    (elsewhere,) = await engine.analyze(["qqqqqqqqqqq"])
    assert elsewhere.novelty == 0


async def test_stats_and_metrics_tell_the_same(telemetry: Telemetry) -> None:
    engine = Engine(EngineConfig(), telemetry, loader=fake_loader(FakeBackend(exact_lengths=False)))
    await engine.start()
    await engine.analyze(texts(40))
    stats = engine.stats()
    sample = telemetry.registry.get_sample_value
    assert stats.texts == stats.texts_computed == 40
    assert sum(stats.batches.values()) == sample("sluice_engine_batches_total", {"length": "32"})
    assert stats.tokens == sample("sluice_engine_tokens_total", {"kind": "real"})
    assert stats.padded_tokens - stats.tokens == sample("sluice_engine_tokens_total", {"kind": "padding"})
    assert 0 < stats.padding_share < 0.5
    assert sample("sluice_engine_texts_total", {"task": "classify", "priority": "background"}) == 40
    await engine.close()


async def test_no_text_reaches_the_log(telemetry: Telemetry) -> None:
    engine = Engine(EngineConfig(text_bytes_max=20), telemetry, loader=fake_loader(FakeBackend()))
    await engine.start()
    await engine.analyze(["canary-4711", "canary-4711 that is too long", "canary\ud800"])
    await engine.close()
    log = telemetry._log._logger._file.getvalue()  # type: ignore[attr-defined]
    assert "engine_text_failed" in log
    assert "canary" not in log
