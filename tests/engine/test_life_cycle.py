"""Models are opened, replaced and closed in every order, and nothing hangs, leaks or ends the process."""

import asyncio
import io
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.config import CacheConfig, EngineConfig, ModelConfig
from engine.loading import Loaded
from engine.reload import ModelReload
from engine.service import Engine
from sluice.connections import TelemetryConfig
from sluice.errors import Permanent, Retryable
from sluice.telemetry import Telemetry
from tests.engine.fakes import FakeBackend, fake_loader

NO_CACHES = CacheConfig(token_bytes_max=0, result_bytes_max=0)


class Loader:
    """Loads a fake device per call; a model with a gate waits there, a model in `errors` fails so."""

    def __init__(self) -> None:
        self.gates: dict[str, threading.Event] = {}
        self.errors: dict[str, Exception] = {}
        self.loading: dict[str, threading.Event] = {}
        self.backends: list[FakeBackend] = []

    def gate(self, model: str) -> threading.Event:
        self.loading[model] = threading.Event()
        self.gates[model] = threading.Event()
        return self.gates[model]

    def __call__(self, config: EngineConfig) -> Loaded:
        if config.model in self.gates:
            self.loading[config.model].set()
            assert self.gates[config.model].wait(30), "the test forgot to open the gate"
        if config.model in self.errors:
            raise self.errors[config.model]
        self.backends.append(FakeBackend())
        return fake_loader(self.backends[-1])(config)


def section(model: str = "first", **more: str) -> EngineConfig:
    models = {name: ModelConfig(model=other) for name, other in more.items()}
    return EngineConfig(model=model, models=models, caches=NO_CACHES)


def telemetry() -> Telemetry:
    return Telemetry("test", TelemetryConfig(log_level="debug"), stream=io.StringIO())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what a thread does has no event to wait on
            await asyncio.sleep(0.001)


def engine_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("engine-")]


@pytest.mark.parametrize("ends", ["drain", "close", "both"])
async def test_an_engine_that_ends_while_a_successor_is_loaded_closes_both(
    open_engine: Callable[..., Any], ends: str
) -> None:
    loader = Loader()
    gate = loader.gate("next")
    engine: Engine = await open_engine(section(), loader=loader)
    swap = asyncio.create_task(engine.swap("default", "next"))
    await until(loader.loading["next"].is_set)
    ending = [
        asyncio.create_task(engine.drain(20) if name == "drain" else engine.close())
        for name in ("drain", "close")
        if ends in {name, "both"}
    ]
    await asyncio.sleep(0)
    gate.set()
    async with asyncio.timeout(20):
        await asyncio.gather(*ending)
        with pytest.raises((Permanent, Retryable)):
            await swap
    assert len(loader.backends) == 2
    assert all(backend.closed for backend in loader.backends)
    with pytest.raises(Permanent, match=r"drain|closed"):
        await engine.swap("default", "next")
    with pytest.raises(Retryable, match=r"drain|closed"):
        await engine.analyze(["x"])


async def test_start_returns_when_the_engine_is_drained_while_it_loads() -> None:
    loader = Loader()
    gate = loader.gate("other")
    engine = Engine(section(second="other", third="never"), telemetry(), loader=loader)
    starting = asyncio.create_task(engine.start())
    await until(loader.loading["other"].is_set)
    draining = asyncio.create_task(engine.drain(20))
    await asyncio.sleep(0)
    gate.set()
    async with asyncio.timeout(20):
        await asyncio.gather(starting, draining)
    assert [backend.closed for backend in loader.backends] == [True, True]
    assert not engine.ready
    assert not engine_threads()


async def test_a_reload_that_comes_while_the_engine_starts_waits_for_it() -> None:
    loader = Loader()
    gate = loader.gate("other")
    engine = Engine(section(second="other"), telemetry(), loader=loader)
    starting = asyncio.create_task(engine.start())
    await until(loader.loading["other"].is_set)
    reloading = asyncio.create_task(engine.reload(section("next", second="other")))
    await asyncio.sleep(0)
    gate.set()
    async with asyncio.timeout(20):
        await starting
        assert await reloading == ["default"]
    assert engine.opened.is_set()
    assert engine.model == "next"
    assert len(loader.backends) == 3
    await engine.close()
    assert all(backend.closed for backend in loader.backends)
    assert not engine_threads()


async def test_a_model_whose_thread_died_is_healed_by_a_reload(open_engine: Callable[..., Any]) -> None:
    loader = Loader()
    engine: Engine = await open_engine(section(), loader=loader)
    engine._models["default"]._broken(RuntimeError("gone"))
    with pytest.raises(Retryable, match="gone"):
        await engine.analyze(["x"])
    assert await engine.reload(section()) == ["default"]
    assert (await engine.analyze(["x"]))[0].error is None


async def test_after_a_reload_that_failed_half_way_every_model_can_still_be_replaced(
    open_engine: Callable[..., Any],
) -> None:
    loader = Loader()
    loader.errors["bad"] = Permanent("model 'bad' is damaged")
    engine: Engine = await open_engine(section(old="first"), loader=loader)
    with pytest.raises(Permanent, match="damaged"):
        await engine.reload(section("next", new="bad"))
    assert set(engine.models) == {"default", "old"}
    assert engine.model == "next"
    assert await engine.swap("old", "other")
    assert sorted(await engine.reload(section("next", new="fine"))) == ["new", "old"]
    assert set(engine.models) == {"default", "new"}


@pytest.fixture
def sighup_as_it_was() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, lambda *_: None)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("sighup_as_it_was")
async def test_a_successor_that_fails_in_any_way_does_not_end_the_service(open_engine: Callable[..., Any]) -> None:
    loader = Loader()
    loader.errors["huge"] = RuntimeError("CUDA out of memory")
    engine: Engine = await open_engine(section(), loader=loader)
    said = io.StringIO()
    events = Telemetry("test", TelemetryConfig(log_level="debug"), stream=said)
    service = ModelReload(engine, lambda: section("huge"), events)
    unhandled = signal.getsignal(signal.SIGHUP)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(service.run())
        await until(lambda: signal.getsignal(signal.SIGHUP) is not unhandled)
        signal.raise_signal(signal.SIGHUP)
        await until(lambda: "CUDA out of memory" in said.getvalue())
        assert not running.done()
        assert (await engine.analyze(["x"]))[0].error is None
        await service.drain(1)
    # While the others still drain, a further one must not end the process.
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
