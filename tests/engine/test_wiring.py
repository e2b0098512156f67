"""That parts which are tested alone are connected: what one of them learns reaches the one that acts on it."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from engine.backend import BackendInfo, DeviceMemory
from engine.buckets import Ladder
from engine.calibrate import measure_devices
from engine.config import LADDER, CacheConfig, EngineConfig
from engine.cost import PRIOR, CostModel
from engine.devices import Opened
from engine.lane import Item, Priority
from engine.scheduler import RETRY_AFTER_S_MAX, RETRY_AFTER_S_MIN, Limits, Scheduler
from engine.service import Engine
from sluice.errors import Backpressure
from tests.engine.fakes import FakeBackend, byte_tokenizer, fake_loader
from tests.engine.fleets import Fleet, device, rows, until

NO_CACHES = CacheConfig(token_bytes_max=0, result_bytes_max=0)
Open = Callable[..., Any]


async def happens(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - figures of the engine have no event to wait on
            await asyncio.sleep(0.001)


def sample(engine: Engine, name: str, **labels: str) -> float | None:
    return engine._telemetry.registry.get_sample_value(f"sluice_engine_{name}", labels)


@dataclass
class Gated(FakeBackend):
    """Waits at a gate with each batch, and remembers their first rows in the order in which they ran."""

    gate: threading.Event | None = field(default_factory=threading.Event)
    ran: list[list[int]] = field(default_factory=list)

    def submit(self, rows: Any, length: int) -> object:
        self.ran.append(rows[0].tolist())
        return super().submit(rows, length)

    def order(self, texts: list[str]) -> list[int]:
        """The places in `texts` of what ran, one text a batch."""
        ids = [tokens.ids.tolist() for tokens in byte_tokenizer().encode(texts)]
        return [ids.index(each) for each in self.ran if each in ids]


async def blocked(open_engine: Open, **settings: Any) -> tuple[Engine, Gated, "asyncio.Task[Any]"]:
    """An engine whose device is busy, one text at a time, until the test opens its gate."""
    backend = Gated()
    config = EngineConfig(**{"caches": NO_CACHES, "batch_rows_max": 1, **settings})
    engine: Engine = await open_engine(config, loader=fake_loader(backend))
    first = asyncio.create_task(engine.analyze(["first of all"]))
    await happens(backend.started.is_set)
    return engine, backend, first


WAITING = [f"text {i}" for i in range(9)]


async def queued(engine: Engine, texts: list[str], **arguments: Any) -> "asyncio.Task[Any]":
    """A call whose texts wait."""
    before = engine.stats()
    call = asyncio.create_task(engine.analyze(texts, **arguments))
    await happens(
        lambda: (
            (engine.stats().queue_tokens, engine.stats().texts_coalesced)
            != (before.queue_tokens, before.texts_coalesced)
        )
    )
    return call


async def remembered(engine: Engine) -> None:
    """The results of all calls that were answered are in the cache."""
    await happens(lambda: not engine._models["default"].session._remembering)


async def test_who_joins_a_text_that_waits_takes_it_along_to_the_front(open_engine: Open) -> None:
    engine, backend, first = await blocked(open_engine, background_max_wait_ms=1e6, online_max_wait_ms=1e6)
    calls = [first, await queued(engine, WAITING), await queued(engine, WAITING[7:8], priority=Priority.ONLINE)]
    assert backend.gate is not None
    backend.gate.set()
    await asyncio.gather(*calls)
    assert backend.order(WAITING) == [7, 0, 1, 2, 3, 4, 5, 6, 8]


async def test_a_calls_deadline_decides_when_its_texts_are_due(open_engine: Open) -> None:
    engine, backend, first = await blocked(open_engine, background_max_wait_ms=1e6)
    calls = [first, await queued(engine, WAITING[:8]), await queued(engine, WAITING[8:], deadline_s=60.0)]
    assert backend.gate is not None
    backend.gate.set()
    await asyncio.gather(*calls)
    assert backend.order(WAITING) == [8, *range(8)]


async def test_the_queue_is_in_the_metrics_while_it_is_long(open_engine: Open) -> None:
    engine, backend, first = await blocked(open_engine)
    second = await queued(engine, WAITING)
    assert sample(engine, "queue_tokens") == engine.stats().queue_tokens == sum(len(text) + 2 for text in WAITING)
    assert backend.gate is not None
    backend.gate.set()
    await asyncio.gather(first, second)
    assert sample(engine, "queue_tokens") == 0


async def test_a_refused_call_is_counted_and_nothing_else_of_it(open_engine: Open) -> None:
    engine, backend, first = await blocked(open_engine, queue_tokens_max=40)
    second = await queued(engine, ["x" * 60])
    assert sample(engine, "call_refused_calls_total") == 0
    with pytest.raises(Backpressure):
        await engine.analyze(WAITING)
    assert sample(engine, "call_refused_calls_total") == 1
    assert backend.gate is not None
    backend.gate.set()
    await asyncio.gather(first, second)
    assert sample(engine, "call_latency_seconds_count", priority="background") == 2


async def test_how_long_calls_take_is_told_by_priority(open_engine: Open) -> None:
    engine: Engine = await open_engine(EngineConfig(), loader=fake_loader(FakeBackend()))
    await engine.analyze(["a", "b"], priority=Priority.ONLINE)
    assert sample(engine, "call_latency_seconds_count", priority="online") == 1
    assert sample(engine, "call_latency_seconds_count", priority="background") == 0
    assert 0 < (sample(engine, "call_latency_seconds_sum", priority="online") or 0) < 20


async def test_hits_and_misses_of_each_cache_are_told_apart_in_the_metrics(open_engine: Open) -> None:
    engine: Engine = await open_engine(EngineConfig(), loader=fake_loader(FakeBackend()))
    for texts in (WAITING, WAITING[:4]):
        await engine.analyze(texts)
        await remembered(engine)
    lookups = {
        (cache, outcome): sample(engine, "cache_lookups_total", cache=cache, outcome=outcome)
        for cache in ("token", "result")
        for outcome in ("hits", "misses")
    }
    assert lookups == {
        ("token", "hits"): 0,
        ("token", "misses"): 9,
        ("result", "hits"): 4,
        ("result", "misses"): 9,
    }


@pytest.mark.parametrize("directory", [False, True])
async def test_a_result_is_used_as_long_as_is_configured(open_engine: Open, directory: bool, tmp_path: Any) -> None:
    where = str(tmp_path) if directory else ""
    for ttl_s, hits in ((1e-6, 0), (1000.0, len(WAITING))):
        config = EngineConfig(caches=CacheConfig(directory=where, result_ttl_s=ttl_s))
        engine: Engine = await open_engine(config, loader=fake_loader(FakeBackend()))
        for _ in range(2):
            await engine.analyze(WAITING)
            await remembered(engine)
        assert engine.stats().result_cache_hits == hits
        await engine.close()


async def test_the_token_cache_has_as_many_entries_as_are_configured(open_engine: Open) -> None:
    for entries, hits in ((4, 4), (100, 9)):
        config = EngineConfig(caches=CacheConfig(token_entries_max=entries, result_bytes_max=0))
        engine: Engine = await open_engine(config, loader=fake_loader(FakeBackend()))
        await engine.analyze(WAITING)
        await engine.analyze(WAITING[::-1])
        assert engine.stats().token_cache_hits <= hits
        assert engine.stats().token_cache_hits > 0
    assert engine.stats().token_cache_hits == hits


def test_a_refused_call_may_come_again_when_what_is_too_much_is_computed() -> None:
    limits = Limits(256, 64, 1000, 0.25, (0.05, 0.25))
    scheduler = Scheduler(Ladder(LADDER, 64), limits, PRIOR)
    scheduler.token_s = 0.01
    scheduler.add([Item(i, 64, Priority.ONLINE, 0.0) for i in range(15)])
    assert scheduler.room(40, Priority.ONLINE) == 0
    assert scheduler.room(140, Priority.ONLINE) == pytest.approx(1.0)
    # A background call has to wait for the share of the online ones, too.
    assert scheduler.room(140, Priority.BACKGROUND) == pytest.approx(3.5)
    assert scheduler.room(42, Priority.ONLINE) == RETRY_AFTER_S_MIN
    assert scheduler.room(10**6, Priority.ONLINE) == RETRY_AFTER_S_MAX
    with pytest.raises(Backpressure) as refused:
        scheduler.add([Item(99, 140, Priority.ONLINE, 0.0)])
    assert refused.value.retry_after_s == pytest.approx(1.0)


def test_what_batches_take_is_learnt_and_reaches_the_scheduler() -> None:
    one = device("one", FakeBackend(), budget=64)
    fleet = Fleet([one], budget=64)
    scheduler = fleet.runner._scheduler
    batch = rows(*[1 + i % 64 for i in range(600)])
    with fleet.running():
        fleet.add(batch)
        fleet.wait(len(batch))
        until(lambda: scheduler.cost is not PRIOR)
    assert one.costs.model != PRIOR
    assert scheduler.cost is one.costs.model
    assert scheduler.token_s == pytest.approx(1 / one.tokens_per_s)


class Accelerator(FakeBackend):
    """No CPU, so that its peaks are measured: 1000 bytes a token, of 2**23 that are free."""

    @property
    def info(self) -> BackendInfo:
        return BackendInfo("gpu", "fp16", 1, exact_lengths=False, length_max=64, embedding_width=32)

    def memory(self) -> DeviceMemory:
        return replace(super().memory(), free=1 << 23)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_what_a_batch_may_have_follows_from_the_peaks_measured_at_start_up(share: float) -> None:
    config = EngineConfig(batch_tokens=1 << 22, batch_rows_max=65536, memory_share_max=share, fit_seconds_max=0.01)
    reasons: dict[str, str] = {}
    (measured,) = measure_devices(config, [Opened("gpu", Accelerator())], Ladder(LADDER, 64), reasons)
    assert measured.terms(0, 1).tokens == int(share * 2**23) // 1000
    assert measured.peaks.keys() == {32, 64}
    assert measured.admission.bytes_per_token == 1000
    assert "1.0 KiB a token" in reasons["memory"]


def test_a_device_is_offered_what_its_own_limits_allow() -> None:
    small, large = (device(name, FakeBackend(), budget=tokens) for name, tokens in (("small", 64), ("large", 256)))
    small.costs.model = CostModel(1e-3, 1e-6, 0.0, 0.0)
    assert [each.terms(10_000, 1).tokens for each in (small, large)] == [64, 256]
    assert small.terms(10_000, 1).cost is small.costs.model
