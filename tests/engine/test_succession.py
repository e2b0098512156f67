"""What the next model, or the next start, takes over: the token cache, and what streams usually say."""

import asyncio
import dataclasses
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.config import CacheConfig, EngineConfig, NoveltyConfig
from engine.loading import Loaded
from engine.novelty_file import NAME, NoveltyFile
from engine.service import Engine
from sluice.errors import Permanent
from tests.engine.fakes import FakeBackend, fake_loader

Open = Callable[..., Any]
USUAL = [f"usual line {i % 5}" for i in range(120)]
LATER = ["usual line 3", "QQQQ ZZZZ !!!!", "usual line 1", "QQQQ ZZZZ !!!!", "xxxxxxxxxxxxx", "usual line 9"]


def loader(config: EngineConfig) -> Loaded:
    """Every model is the same one, but for those whose name begins with `other`."""
    loaded = fake_loader(FakeBackend())(config)
    if config.model.startswith("other"):
        loaded.card = dataclasses.replace(loaded.card, version="f" * 12)
    return loaded


def section(directory: Path | None = None, **caches: Any) -> EngineConfig:
    cached = CacheConfig(directory=str(directory or ""), result_bytes_max=0, **caches)
    return EngineConfig(model="first", caches=cached)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what a thread does has no event to wait on
            await asyncio.sleep(0.001)


async def novelties(engine: Engine, texts: list[str], stream: str = "s") -> list[float]:
    return [each.novelty for each in await engine.analyze(texts, stream=stream)]


def damages(engine: Engine) -> float:
    return engine._telemetry.registry.get_sample_value("sluice_engine_cache_damaged_entries_total") or 0.0


@pytest.fixture
async def undisturbed(open_engine: Open) -> list[float]:
    """The novelty of `LATER` when nothing was replaced or started anew."""
    engine = await open_engine(section(), loader=loader)
    await novelties(engine, USUAL)
    found = await novelties(engine, LATER)
    assert max(found[0], found[2]) < 0.1 < found[1]
    return found


async def test_after_a_swap_the_next_model_writes_the_token_cache(open_engine: Open, tmp_path: Path) -> None:
    config = section(tmp_path)
    engine: Engine = await open_engine(config, loader=loader)
    await engine.analyze(USUAL)
    await engine.swap("default", "next")
    tokens: Any = engine._models["default"].session._preparer._tokens
    async with asyncio.timeout(20):
        while tokens.role != "writer":
            await engine.analyze(["any"])
    await engine.analyze(LATER)
    await engine.close()
    again: Engine = await open_engine(config, loader=loader)
    await again.analyze([*USUAL, *LATER])
    stats = again.stats()
    assert (stats.token_cache_hits, stats.token_cache_misses) == (len(USUAL) + len(LATER), 0)
    assert damages(engine) == damages(again) == 0


@pytest.mark.parametrize("kept", [False, True])
async def test_a_swap_to_the_same_embeddings_forgets_no_stream(
    open_engine: Open, tmp_path: Path, undisturbed: list[float], kept: bool
) -> None:
    engine: Engine = await open_engine(section(tmp_path if kept else None), loader=loader)
    await novelties(engine, USUAL)
    await engine.swap("default", "the same elsewhere")
    assert await novelties(engine, LATER) == undisturbed


@pytest.mark.parametrize("change", [{"model": "other"}, {"novelty": NoveltyConfig(merge_similarity=0.5)}])
async def test_other_embeddings_or_settings_begin_anew(open_engine: Open, change: dict[str, Any]) -> None:
    engine: Engine = await open_engine(section(), loader=loader)
    await novelties(engine, USUAL)
    await engine.reload(msgspec.structs.replace(section(), **change))
    assert (await novelties(engine, LATER))[1] < 0.1, "a new stream does not alarm"


async def test_a_restart_forgets_no_stream(open_engine: Open, tmp_path: Path, undisturbed: list[float]) -> None:
    first: Engine = await open_engine(section(tmp_path / "caches"), loader=loader)
    await novelties(first, USUAL)
    await first.drain(5)
    again: Engine = await open_engine(section(tmp_path / "caches"), loader=loader)
    assert await novelties(again, LATER) == undisturbed
    assert damages(first) == damages(again) == 0


async def test_what_streams_say_is_saved_while_the_engine_runs(
    open_engine: Open, tmp_path: Path, undisturbed: list[float]
) -> None:
    config = section(tmp_path, novelty_save_s=0.001)
    engine: Engine = await open_engine(config, loader=loader)
    await novelties(engine, USUAL)
    await novelties(engine, ["one more"], stream="another one")  # the first reading may have come too soon
    await until((tmp_path / NAME).exists)
    beside: Engine = await open_engine(config, loader=loader)  # the first one is still there, as if it had been killed
    assert await novelties(beside, LATER) == undisturbed


@pytest.mark.parametrize("damage", ["content", "another model"])
async def test_a_file_that_cannot_be_used_is_told_and_replaced(open_engine: Open, tmp_path: Path, damage: str) -> None:
    first: Engine = await open_engine(section(tmp_path), loader=loader)
    await novelties(first, USUAL)
    await first.close()
    config = section(tmp_path)
    if damage == "content":
        (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes()[:-1])
    else:
        config = msgspec.structs.replace(config, model="other")
    second: Engine = await open_engine(config, loader=loader)
    assert (await novelties(second, LATER))[1] < 0.1
    assert damages(second) == 1
    await novelties(second, USUAL)
    await second.close()
    third: Engine = await open_engine(config, loader=loader)
    assert (await novelties(third, ["~~~~~~~~"]))[0] > 0.1
    assert damages(third) == 0


@pytest.mark.parametrize(("skip", "names"), [(("s",), {"t"}), (("*",), None), ((), {"s", "t"})])
async def test_streams_that_enter_no_cache_are_not_saved(
    open_engine: Open, tmp_path: Path, skip: tuple[str, ...], names: set[str] | None
) -> None:
    config = section(tmp_path, skip_streams=skip)
    engine: Engine = await open_engine(config, loader=loader)
    for stream in ("s", "t"):
        await novelties(engine, USUAL, stream)
    await engine.close()
    assert (tmp_path / NAME).exists() == (names is not None)
    again: Engine = await open_engine(config, loader=loader)
    known: Any = again._models["default"].session.novelty
    await again.analyze(["any"])  # what is saved is read before it
    assert set(known._streams) == (names or set())


async def saved_streams(open_engine: Open, directory: Path) -> set[str]:
    if not (directory / NAME).exists():
        return set()
    engine: Engine = await open_engine(section(directory), loader=loader)
    known: Any = engine._models["default"].session.novelty
    await engine.analyze(["any"])  # what is saved is read before it
    return set(known._streams) - {""}


@pytest.mark.parametrize(("skip", "names"), [(("s",), {"t"}), (("*",), set())])
@pytest.mark.parametrize("model", ["the same elsewhere", "other"])
@pytest.mark.parametrize("restarted", [False, True])
async def test_a_stream_that_is_skipped_from_now_on_is_on_no_disk_afterwards(
    open_engine: Open, tmp_path: Path, skip: tuple[str, ...], names: set[str], model: str, restarted: bool
) -> None:
    engine: Engine = await open_engine(section(tmp_path), loader=loader)
    for stream in ("s", "t"):
        await novelties(engine, USUAL, stream)
    if restarted:
        await engine.close()
        engine = await open_engine(section(tmp_path), loader=loader)
    await engine.reload(msgspec.structs.replace(section(tmp_path, skip_streams=skip), model=model))
    file = tmp_path / NAME
    assert not file.exists() or b"\xa1s" not in file.read_bytes()
    kept = names if model != "other" else set()
    assert await saved_streams(open_engine, tmp_path) == kept
    await engine.close()
    assert await saved_streams(open_engine, tmp_path) == kept


def slow_disk(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """The next saving begins, which sets the first event, and ends when the second one is set."""
    begun, go_on, real, first = threading.Event(), threading.Event(), os.fsync, [True]

    def fsync(descriptor: int) -> None:
        if first:
            first.clear()
            begun.set()
            assert go_on.wait(20)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return begun, go_on


@pytest.mark.parametrize("model", ["the same elsewhere", "other"])
@pytest.mark.parametrize("saved_meanwhile", [False, True])
async def test_a_saving_that_takes_longer_than_the_swap_leaves_no_skipped_stream(
    open_engine: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, saved_meanwhile: bool
) -> None:
    config = section(tmp_path, novelty_save_s=0.001)
    engine: Engine = await open_engine(config, loader=loader)
    for stream in ("s", "t"):
        await novelties(engine, USUAL, stream)
    await engine._models["default"].keep_streams()
    old = engine._models["default"].session
    begun, go_on = slow_disk(monkeypatch)
    await novelties(engine, ["one more"], "s")
    await until(begun.is_set)
    skipping = msgspec.structs.replace(config.caches, skip_streams=("s",))
    swap = asyncio.create_task(engine.reload(msgspec.structs.replace(config, caches=skipping, model=model)))
    await until(lambda: engine._models["default"].session is not old)
    if saved_meanwhile:
        new = engine._models["default"].session
        await novelties(engine, ["one more"], "t")
        await until(lambda: new._saving is not None and new._saving.done())
        assert b"\xa1s" not in (tmp_path / NAME).read_bytes()
    go_on.set()
    await swap
    assert b"\xa1s" not in (tmp_path / NAME).read_bytes()
    await engine.close()
    assert b"\xa1s" not in (tmp_path / NAME).read_bytes()


@pytest.mark.parametrize("model", ["poor", "other and poor"])
@pytest.mark.parametrize("skip", [("x",), ("*",)])
async def test_a_model_that_is_not_taken_into_use_changes_nothing_that_is_saved(
    open_engine: Open, tmp_path: Path, model: str, skip: tuple[str, ...]
) -> None:
    def poor(config: EngineConfig) -> Loaded:
        loaded = loader(config)
        if config.model.endswith("poor"):
            del loaded.tasks["classify"]
        return loaded

    config = section(tmp_path, novelty_save_s=0.001)
    engine: Engine = await open_engine(config, loader=poor)
    await novelties(engine, USUAL)
    await engine._models["default"].keep_streams()
    assert (tmp_path / NAME).exists()
    with pytest.raises(Permanent, match="cannot take over"):
        await engine.reload(msgspec.structs.replace(section(tmp_path, skip_streams=skip), model=model))
    await engine.close()
    assert await saved_streams(open_engine, tmp_path) == {"s"}


async def test_a_saving_that_fails_keeps_no_cache_from_being_closed(
    open_engine: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: NoveltyFile) -> bytes:
        raise MemoryError

    engine: Engine = await open_engine(section(tmp_path), loader=loader)
    await novelties(engine, USUAL)
    monkeypatch.setattr(NoveltyFile, "pack", broken)
    await engine.close()
    assert damages(engine) == 1
    again: Engine = await open_engine(section(tmp_path), loader=loader)
    tokens: Any = again._models["default"].session._preparer._tokens
    assert tokens.role == "writer"
