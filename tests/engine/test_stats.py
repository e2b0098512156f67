"""Figures: what callers saw, what devices have, and whether the engine is ready."""

import asyncio
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest

from engine.backend import Backend, DeviceLost
from engine.config import CacheConfig, EngineConfig, ModelConfig
from engine.loading import Loaded
from engine.service import Engine
from sluice.errors import Retryable
from tests.engine.fakes import Again, FakeBackend, fake_loader

NO_CACHES = CacheConfig(token_bytes_max=0, result_bytes_max=0)
Open = Callable[..., Any]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what a thread does has no event to wait on
            await asyncio.sleep(0.001)


def sample(engine: Engine, name: str, **labels: str) -> float | None:
    return engine._telemetry.registry.get_sample_value(f"sluice_engine_{name}", labels)


class Mortal(FakeBackend):
    """Dies with every batch from when the test arms it."""

    armed = False

    def collect(self, ticket: object) -> Any:
        if not self.armed:
            return super().collect(ticket)
        self.started.set()
        assert self.gate is None or self.gate.wait(20)
        raise DeviceLost("gone")


def on(backend: Mortal, reopen: Callable[[], Backend]) -> Callable[[EngineConfig], Loaded]:
    def load(config: EngineConfig) -> Loaded:
        loaded = fake_loader(backend)(config)
        loaded.devices[0].reopen = Again(reopen)
        backend.armed = True
        return loaded

    return load


async def test_an_engine_without_a_device_is_not_ready_until_one_is_back(open_engine: Open) -> None:
    repaired = threading.Event()

    def reopen() -> Backend:
        if not repaired.is_set():
            raise Retryable("still broken")
        return FakeBackend()

    config = EngineConfig(
        caches=NO_CACHES, worker_restart_s_first=0.01, worker_restart_s_max=0.02, worker_gone_s_max=0.05
    )
    engine: Engine = await open_engine(config, loader=on(Mortal(), reopen))
    assert engine.ready
    (lost,) = await engine.analyze(["x"])
    assert "no device is left" in str(lost.error)
    await until(lambda: not engine.ready)
    with pytest.raises(Retryable, match="no device is left"):
        await engine.analyze(["x"])
    repaired.set()
    await until(lambda: engine.ready)
    assert (await engine.analyze(["x"]))[0].error is None


async def test_a_text_that_ran_again_for_who_had_time_is_late_once_for_who_had_none(open_engine: Open) -> None:
    gate = threading.Event()
    backend = Mortal(gate=gate)
    config = EngineConfig(caches=NO_CACHES, worker_restart_s_first=0.01)
    engine: Engine = await open_engine(config, loader=on(backend, FakeBackend))
    hurried = asyncio.create_task(engine.analyze(["same"], deadline_s=0.1))
    await until(backend.started.is_set)
    patient = asyncio.create_task(engine.analyze(["same"]))
    await until(lambda: engine.stats().texts_coalesced == 1)
    assert (await hurried)[0].reason == "deadline"
    gate.set()
    assert (await patient)[0].error is None
    stats = engine.stats()
    assert (stats.texts, stats.texts_expired, stats.texts_failed) == (2, 1, 1)
    assert sample(engine, "text_failed_texts_total", reason="deadline") == 1


async def test_memory_of_each_device_is_in_the_figures_and_the_metrics_as_long_as_it_is_there(
    open_engine: Open,
) -> None:
    def load(config: EngineConfig) -> Loaded:
        loaded = fake_loader(FakeBackend())(config)
        loaded.devices[0].peaks = {32: 1000, 64: 5000}
        return loaded

    config = EngineConfig(model="first", models={"second": ModelConfig(model="other")}, caches=NO_CACHES)
    engine: Engine = await open_engine(config, loader=load)
    for model in ("default", "second"):
        await engine.analyze(["some text"], model=model)
    await until(lambda: all(device.memory for device in engine.stats().devices))
    assert [(each.memory.free, each.peaks) for each in engine.stats().devices if each.memory] == [
        (1 << 30, {32: 1000, 64: 5000})
    ] * 2
    for model, figures in zip(("default", "second"), engine.stats().devices, strict=True):
        device = {"model": model, "device": "fake"}
        kinds = ("allocated", "reserved", "free", "peak")
        memory = {kind: sample(engine, "device_memory_bytes", **device, kind=kind) for kind in kinds}
        assert figures.memory is not None
        assert memory == dataclasses.asdict(figures.memory)
        assert sample(engine, "device_batch_peak_bytes", **device, length="64") == 5000
        assert sample(engine, "device_batch_tokens_max", **device) == 256
        assert sample(engine, "device_busy_seconds_total", **device) == pytest.approx(figures.busy_s)
        assert figures.busy_s > 0
    await engine.reload(EngineConfig(model="first", caches=NO_CACHES))
    assert sample(engine, "device_batch_tokens_max", model="second", device="fake") is None
    assert sample(engine, "device_batch_tokens_max", model="default", device="fake") == 256


async def test_what_may_be_counted_is_shown_before_it_is(open_engine: Open) -> None:
    engine: Engine = await open_engine(EngineConfig(caches=NO_CACHES), loader=fake_loader(FakeBackend()))
    for name, labels in {
        "texts_total": {"task": "tokens", "priority": "online"},
        "call_latency_seconds_count": {"priority": "background"},
        "batches_total": {"length": "512"},
        "tokens_total": {"kind": "padding"},
        "cache_lookups_total": {"cache": "result", "outcome": "hits"},
        "text_failed_texts_total": {"reason": "deadline"},
        "batch_split_batches_total": {},
        "call_refused_calls_total": {},
        "cache_damaged_entries_total": {},
        "failed_models_total": {},
        "device_lost_events_total": {"kind": "lost"},
        "device_restored_events_total": {"kind": "up"},
        "device_busy_seconds_total": {"model": "default", "device": "fake"},
        "generations_total": {"outcome": "refused", "priority": "online"},
        "generation_tokens_total": {"kind": "new"},
        "generation_first_token_seconds_count": {"priority": "background"},
    }.items():
        assert sample(engine, name, **labels) == 0, name
