"""Several models in one engine, and models that are replaced while they work."""

import asyncio
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.config import CacheConfig, EngineConfig, ModelConfig
from engine.loading import Loaded
from engine.reload import ModelReload
from engine.service import Engine
from sluice.config import load
from sluice.connections import TelemetryConfig
from sluice.errors import ConfigError, Permanent
from sluice.telemetry import Telemetry
from tests.engine.fakes import FakeBackend, fake_loader

NO_CACHES = CacheConfig(token_bytes_max=0, result_bytes_max=0)
TEXTS = [f"text {i}" for i in range(40)]


class Shelf:
    """Loads the fake device of a model by its name; a model without one is not there."""

    def __init__(self, **backends: FakeBackend) -> None:
        self.backends = backends

    def __call__(self, config: EngineConfig) -> Loaded:
        if config.model not in self.backends:
            raise Permanent(f"model '{config.model}' was not found")
        loaded = fake_loader(self.backends[config.model])(config)
        loaded.card = _renamed(loaded.card, config.model)
        return loaded


def _renamed(card: Any, name: str) -> Any:
    from dataclasses import replace

    return replace(card, name=name, version=name.encode().hex().ljust(12, "0")[:12])


def config(**more: str) -> EngineConfig:
    models = {name: ModelConfig(model=model) for name, model in more.items()}
    return EngineConfig(model="first", models=models, caches=NO_CACHES)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what a thread does has no event to wait on
            await asyncio.sleep(0.001)


async def test_a_call_is_served_by_the_model_it_names(open_engine: Callable[..., Any]) -> None:
    shelf = Shelf(first=FakeBackend(), other=FakeBackend())
    engine: Engine = await open_engine(config(second="other"), loader=shelf)
    assert engine.ready
    assert set(engine.models) == {"default", "second"}
    assert len(set(engine.models.values())) == 2
    assert {each.model for each in await engine.analyze(TEXTS)} == {"first"}
    assert {each.model for each in await engine.analyze(TEXTS, model="second")} == {"other"}
    assert {each.model for each in await engine.analyze(TEXTS[:3], model="default")} == {"first"}
    assert sum(rows for rows, _ in shelf.backends["other"].batches) == len(TEXTS)
    assert engine.stats().texts == 2 * len(TEXTS) + 3
    with pytest.raises(Permanent, match="no model 'third'; there are default, second"):
        await engine.analyze(TEXTS, model="third")


async def test_a_task_that_only_another_model_offers_goes_there(open_engine: Callable[..., Any]) -> None:
    shelf = Shelf(first=FakeBackend(), other=FakeBackend())

    def loader(section: EngineConfig) -> Loaded:
        loaded = shelf(section)
        if section.model == "other":
            loaded.tasks = {"special": loaded.tasks["embed"]}
        return loaded

    engine: Engine = await open_engine(config(second="other"), loader=loader)
    (special,) = await engine.analyze(["x"], task="special")
    assert (special.model, special.error) == ("other", None)
    assert (await engine.analyze(["x"], task="embed"))[0].model == "first"
    with pytest.raises(Permanent, match="task 'no-such' is not available with model 'first'"):
        await engine.analyze(["x"], task="no-such")


async def test_a_swap_under_load_drops_no_request_and_every_result_names_its_model(
    open_engine: Callable[..., Any],
) -> None:
    gate = threading.Event()
    shelf = Shelf(first=FakeBackend(gate=gate), next=FakeBackend())
    engine: Engine = await open_engine(config(), loader=shelf)
    before = engine.model_version
    early = [asyncio.create_task(engine.analyze([f"{i} {text}" for text in TEXTS])) for i in range(5)]
    await until(shelf.backends["first"].started.is_set)
    swap = asyncio.create_task(engine.swap("default", "next"))
    await until(lambda: engine.model_version not in ("", before))
    # The old one is still at its gate; the new one serves.
    late = await engine.analyze(TEXTS)
    assert {each.model for each in late} == {"next"}
    assert not any(task.done() for task in early)
    gate.set()
    version = await swap
    assert version == engine.model_version != before
    for results in await asyncio.gather(*early):
        assert {(each.model, each.model_version, each.error) for each in results} == {("first", before, None)}
    assert shelf.backends["first"].closed
    assert not shelf.backends["next"].closed
    assert engine.model == "next"
    assert engine.stats().texts == 6 * len(TEXTS)


async def test_a_model_that_cannot_be_loaded_leaves_the_old_one_in_place(open_engine: Callable[..., Any]) -> None:
    shelf = Shelf(first=FakeBackend(), poor=FakeBackend())

    def loader(section: EngineConfig) -> Loaded:
        loaded = shelf(section)
        if section.model == "poor":
            del loaded.tasks["classify"]
        return loaded

    engine: Engine = await open_engine(config(), loader=loader)
    before = engine.model_version
    with pytest.raises(Permanent, match="'absent' was not found"):
        await engine.swap("default", "absent")
    with pytest.raises(Permanent, match="'poor' cannot take over: it does not offer classify"):
        await engine.swap("default", "poor")
    with pytest.raises(Permanent, match="no model 'who'; there are default"):
        await engine.swap("who", "first")
    assert shelf.backends["poor"].closed
    assert (engine.model_version, engine.model, engine.ready) == (before, "first", True)
    assert {each.model for each in await engine.analyze(TEXTS)} == {"first"}


async def test_a_call_that_outlasts_the_swap_gets_an_error_and_is_not_lost(open_engine: Callable[..., Any]) -> None:
    gate = threading.Event()
    shelf = Shelf(first=FakeBackend(gate=gate), next=FakeBackend())
    engine: Engine = await open_engine(
        EngineConfig(model="first", caches=NO_CACHES, swap_drain_s=0.05, batch_tokens=16), loader=shelf
    )
    stuck = asyncio.create_task(engine.analyze(TEXTS))
    await until(shelf.backends["first"].started.is_set)
    swap = asyncio.create_task(engine.swap("default", "next"))
    await until(lambda: engine.model == "next")
    await until(lambda: any(served.is_open and served._session.runner.stopping for served in engine._alive))
    gate.set()
    await swap
    results = await stuck
    assert len(results) == len(TEXTS)
    assert any(each.error and "engine stopped" in each.error for each in results)


def test_names_and_directories_of_models() -> None:
    tree = {"model": "a", "caches": {"directory": "/caches"}, "models": {"ner": {"model": "b", "precision": "fp32"}}}
    section = load(EngineConfig, overrides=tree)
    assert section.names == ("default", "ner")
    ner, default = section.of("ner"), section.of("default")
    assert (ner.model, ner.precision, ner.caches.directory) == ("b", "fp32", "/caches/ner")
    assert (default.model, default.precision, default.caches.directory) == ("a", "auto", "/caches")
    assert section.with_model("ner", "c").of("ner").model == "c"
    assert section.with_model("default", "c").of("default").model == "c"
    for bad in ("default", "../x", ""):
        with pytest.raises(ConfigError, match=r"engine\.models"):
            load(EngineConfig, overrides={"models": {bad: {"model": "b"}}})
    with pytest.raises(ConfigError, match="did you mean"):
        load(EngineConfig, overrides={"models": {"ner": {"modell": "b"}}})


async def test_a_changed_section_is_taken_over_model_by_model(open_engine: Callable[..., Any]) -> None:
    shelf = Shelf(first=FakeBackend(), next=FakeBackend(), other=FakeBackend(), third=FakeBackend())
    engine: Engine = await open_engine(config(second="other"), loader=shelf)
    before = engine.models
    assert await engine.reload(config(second="other")) == []
    assert engine.models == before
    changed = EngineConfig(model="next", models={"more": ModelConfig(model="third")}, caches=NO_CACHES)
    assert await engine.reload(changed) == ["default", "more", "second"]
    assert {each.model for each in await engine.analyze(TEXTS)} == {"next"}
    assert {each.model for each in await engine.analyze(TEXTS, model="more")} == {"third"}
    with pytest.raises(Permanent, match="no model 'second'"):
        await engine.analyze(TEXTS, model="second")
    assert [shelf.backends[name].closed for name in ("first", "other", "next", "third")] == [True, True, False, False]


async def test_an_engine_that_closes_while_it_replaces_models_opens_no_further_one(
    open_engine: Callable[..., Any],
) -> None:
    gate = threading.Event()
    shelf = Shelf(first=FakeBackend(gate=gate), next=FakeBackend(), other=FakeBackend())
    engine: Engine = await open_engine(config(second="other"), loader=shelf)
    call = asyncio.create_task(engine.analyze(TEXTS))
    await until(shelf.backends["first"].started.is_set)
    loaded: list[str] = []
    engine._load = lambda section: loaded.append(section.model) or shelf(section)  # type: ignore[func-returns-value]
    changed = EngineConfig(model="next", models={"second": ModelConfig(model="next")}, caches=NO_CACHES)
    reload = asyncio.create_task(engine.reload(changed))
    await until(lambda: engine.model == "next")
    closing = asyncio.create_task(engine.close())
    await until(lambda: bool(engine._closed))
    gate.set()
    await closing
    with pytest.raises(Permanent, match="the engine is closed"):
        await reload
    assert loaded == ["next"]
    await call


@pytest.fixture
def harmless_sighup() -> Iterator[None]:
    """A SIGHUP that nobody handles must fail the test and not end the process that runs it."""
    before = signal.signal(signal.SIGHUP, lambda *_: None)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("harmless_sighup")
async def test_sighup_reads_the_configuration_again_and_a_bad_one_changes_nothing(
    open_engine: Callable[..., Any],
) -> None:
    shelf = Shelf(first=FakeBackend(), next=FakeBackend())
    engine: Engine = await open_engine(config(), loader=shelf)
    wanted = ["absent"]
    said = io.StringIO()
    telemetry = Telemetry("test", TelemetryConfig(log_level="debug"), stream=said)
    service = ModelReload(engine, lambda: EngineConfig(model=wanted[0], caches=NO_CACHES), telemetry)
    unhandled = signal.getsignal(signal.SIGHUP)
    async with asyncio.TaskGroup() as group:
        group.create_task(service.run())
        await until(lambda: signal.getsignal(signal.SIGHUP) is not unhandled)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: "'absent' was not found" in said.getvalue())
        assert (engine.model, engine.ready) == ("first", True)
        wanted[0] = "next"
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: "engine_reloaded" in said.getvalue())
        assert engine.model == "next"
        await service.drain(1)
    await service.drain(1)


async def test_a_session_that_cannot_be_made_is_an_error_of_start_and_not_a_hang() -> None:
    def loader(section: EngineConfig) -> Loaded:
        loaded = fake_loader(FakeBackend())(section)
        del loaded.tokenizer
        return loaded

    telemetry = Telemetry("test", TelemetryConfig(log_level="debug"), stream=io.StringIO())
    engine = Engine(config(), telemetry, loader=loader)
    async with asyncio.timeout(30):
        with pytest.raises(AttributeError):
            await engine.start()
        await engine.close()
