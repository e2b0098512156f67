"""The one host thread under load: who is prepared first, in what pieces, what is refused before it costs anything."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from engine.analysis import Reading
from engine.config import CacheConfig, EngineConfig
from engine.prepare import Prepared, Preparer
from engine.service import Engine, Priority
from sluice.errors import Backpressure, Permanent
from tests.engine.fakes import FakeBackend, fake_loader

NO_CACHES = CacheConfig(token_bytes_max=0, result_bytes_max=0)
Open = Callable[..., Any]


class Watched:
    """What the host thread does, in its order. It waits at gates: before it prepares the text `held`, and to read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prepared: list[Sequence[object]] = []
        self.read: list[Sequence[str]] = []
        self.preparing, self.reading = threading.Event(), threading.Event()
        self.prepare_gate, self.read_gate = threading.Event(), threading.Event()
        self.prepare_gate.set()
        self.read_gate.set()
        prepare, read = Preparer.prepare, Reading.read

        def watched_prepare(preparer: Preparer, texts: Sequence[object], stream: str) -> list[Prepared]:
            self.prepared.append(texts)
            if "held" in texts:
                self.preparing.set()
                assert self.prepare_gate.wait(20)
            return prepare(preparer, texts, stream)

        def watched_read(reading: Reading, outcomes: Any, texts: Sequence[str]) -> Any:
            self.read.append(texts)
            self.reading.set()
            assert self.read_gate.wait(20)
            return read(reading, outcomes, texts)

        monkeypatch.setattr(Preparer, "prepare", watched_prepare)
        monkeypatch.setattr(Reading, "read", watched_read)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - figures of the engine have no event to wait on
            await asyncio.sleep(0.001)


def call(engine: Engine, *texts: str, priority: Priority = Priority.BACKGROUND) -> "asyncio.Task[Any]":
    return asyncio.create_task(engine.analyze(texts, priority=priority))


async def held(engine: Engine, watched: Watched) -> "asyncio.Task[Any]":
    """A background call that the host thread is at, until `prepare_gate` opens."""
    watched.prepare_gate.clear()
    running = call(engine, "held")
    await until(watched.preparing.is_set)
    return running


async def test_an_online_text_is_prepared_before_all_background_that_waits(open_engine: Open, watched: Watched) -> None:
    engine: Engine = await open_engine(EngineConfig(caches=NO_CACHES), loader=fake_loader(FakeBackend()))
    calls = [await held(engine, watched)]
    calls += [call(engine, f"background {i}") for i in range(100)]
    await until(lambda: len(engine._turns) == 100)
    calls += [call(engine, f"online {i}", priority=Priority.ONLINE) for i in range(2)]
    await until(lambda: len(engine._turns) == 102)
    watched.prepare_gate.set()
    assert [each.error for got in await asyncio.gather(*calls) for each in got] == [None] * 103
    order = [str(texts[0]) for texts in watched.prepared]
    # Background has its share of the time, but never two pieces while online waits.
    assert max(order.index("online 0"), order.index("online 1")) <= 3
    background = [text for text in order if text.startswith("background")]
    assert background == [f"background {i}" for i in range(100)]


async def test_models_share_the_turns(open_engine: Open, watched: Watched) -> None:
    from engine.config import ModelConfig

    config = EngineConfig(caches=NO_CACHES, models={"other": ModelConfig(model="another")})

    def load(section: EngineConfig) -> Any:
        return fake_loader(FakeBackend())(section)

    engine: Engine = await open_engine(config, loader=load)
    calls = [await held(engine, watched)]
    calls += [call(engine, f"background {i}") for i in range(20)]
    await until(lambda: len(engine._turns) == 20)
    calls += [asyncio.create_task(engine.analyze(["online"], model="other", priority=Priority.ONLINE))]
    await until(lambda: len(engine._turns) == 21)
    watched.prepare_gate.set()
    await asyncio.gather(*calls)
    assert [str(texts[0]) for texts in watched.prepared].index("online") <= 2


async def test_calls_that_wait_to_be_prepared_are_bounded(open_engine: Open, watched: Watched) -> None:
    config = EngineConfig(caches=NO_CACHES, calls_waiting_max=8, online_share=0.25)
    engine: Engine = await open_engine(config, loader=fake_loader(FakeBackend()))
    calls = [await held(engine, watched)]
    calls += [call(engine, f"background {i}") for i in range(6)]
    await until(lambda: len(engine._turns) == 6)
    with pytest.raises(Backpressure, match="calls_waiting_max"):
        await engine.analyze(["one too many"])
    calls += [call(engine, f"online {i}", priority=Priority.ONLINE) for i in range(2)]
    await until(lambda: len(engine._turns) == 8)
    with pytest.raises(Backpressure, match="calls_waiting_max"):
        await engine.analyze(["one too many"], priority=Priority.ONLINE)
    watched.prepare_gate.set()
    assert [each.error for got in await asyncio.gather(*calls) for each in got] == [None] * 9
    assert (await engine.analyze(["later"]))[0].error is None


async def test_a_full_queue_refuses_before_the_texts_cost_anything(open_engine: Open, watched: Watched) -> None:
    gate = threading.Event()
    config = EngineConfig(
        caches=NO_CACHES, queue_tokens_max=100, online_share=0.0, batch_tokens=64, calls_in_line_max=1
    )
    backend = FakeBackend(gate=gate)
    engine: Engine = await open_engine(config, loader=fake_loader(backend))
    running = call(engine, "running")
    await until(backend.started.is_set)
    early = call(engine, "y" * 48)
    await until(lambda: engine.stats().queue_tokens == 50)
    # One that waits for its turn while the queue fills up, and one that comes when it is full.
    first = await held(engine, watched)
    waiting = [call(engine, f"{i}" + "x" * 47) for i in range(3)]
    await until(lambda: len(engine._turns) == 3)
    before = len(watched.prepared)
    watched.prepare_gate.set()
    got = await asyncio.gather(*waiting[1:], return_exceptions=True)
    assert [type(each) for each in got] == [Backpressure] * 2
    with pytest.raises(Backpressure):
        await engine.analyze(["never looked at"] * 1000)
    assert watched.prepared[before:] == [("0" + "x" * 47,)]
    gate.set()
    for task in (running, early, first, waiting[0]):
        assert (await task)[0].error is None


async def test_a_full_queue_refuses_at_once_whatever_waits_to_be_prepared(open_engine: Open, watched: Watched) -> None:
    gate = threading.Event()
    backend = FakeBackend(gate=gate)
    config = EngineConfig(caches=NO_CACHES, queue_tokens_max=50, online_share=0.0, batch_tokens=64, chunk_texts=1)
    engine: Engine = await open_engine(config, loader=fake_loader(backend))
    running = call(engine, "running")
    await until(backend.started.is_set)
    watched.prepare_gate.clear()
    large = call(engine, "y" * 48, "held")
    await until(watched.preparing.is_set)
    with pytest.raises(Backpressure):
        await asyncio.wait_for(engine.analyze(["no room"]), 10)
    watched.prepare_gate.set()
    gate.set()
    assert [each.error for got in await asyncio.gather(running, large) for each in got] == [None] * 3


async def test_an_accepted_call_is_not_refused_later(open_engine: Open, watched: Watched) -> None:
    gate = threading.Event()
    config = EngineConfig(queue_tokens_max=100, online_share=0.0, batch_tokens=64, chunk_texts=1)
    backend = FakeBackend(gate=gate)
    engine: Engine = await open_engine(config, loader=fake_loader(backend))
    gate.set()
    await engine.analyze(["known"])
    gate.clear()
    backend.started.clear()
    running = call(engine, "running")
    await until(backend.started.is_set)
    watched.prepare_gate.clear()
    # Its first text is in the result cache, and when its second one is ready the queue is full.
    large = call(engine, "known", "held", *(f"{i}" + "x" * 40 for i in range(4)))
    await until(watched.preparing.is_set)
    filling = [call(engine, f"{i}" + "y" * 47, priority=Priority.ONLINE) for i in range(2)]
    await until(lambda: len(engine._turns) == 2)
    watched.prepare_gate.set()
    await until(lambda: any(engine._models["default"].session.flights._lines.values()))
    gate.set()
    for task in (running, large, *filling):
        assert [each.error for each in await task if each.error] == []


async def test_long_texts_are_prepared_and_read_few_at_a_time(open_engine: Open, watched: Watched) -> None:
    config = EngineConfig(caches=NO_CACHES, chunk_texts=4, chunk_chars=100)
    engine: Engine = await open_engine(config, loader=fake_loader(FakeBackend()))
    texts = ["a" * 60, "b" * 60, "c" * 40, "d" * 500, "e", "f", None, "g", "h", "i" * 97]
    got = await engine.analyze(texts)  # type: ignore[arg-type]
    assert [i for i, each in enumerate(got) if each.error] == [6]
    for seen in (watched.prepared, watched.read):
        assert [[str(text)[0] for text in part] for part in seen] == [["a"], ["b", "c"], ["d"], [*"efNg"], ["h", "i"]]


STAGES = ("waits to be prepared", "is prepared", "waits to be computed", "waits to be read", "is read")


@pytest.mark.parametrize("stage", STAGES)
async def test_a_call_that_is_cancelled_leaves_nothing_behind(open_engine: Open, watched: Watched, stage: str) -> None:
    gate = threading.Event()
    backend = FakeBackend(gate=gate)
    engine: Engine = await open_engine(EngineConfig(caches=NO_CACHES), loader=fake_loader(backend))
    others = []
    if stage == "waits to be prepared":
        others = [await held(engine, watched)]
        doomed = call(engine, "doomed")
        await until(lambda: len(engine._turns) == 1)
    elif stage == "is prepared":
        doomed = await held(engine, watched)
        others = [call(engine, "other")]
        await until(lambda: len(engine._turns) == 1)
    elif stage == "waits to be computed":
        others = [call(engine, "running")]
        await until(backend.started.is_set)
        doomed = call(engine, "doomed")
        await until(lambda: engine.stats().queue_tokens > 0)
    else:
        gate.set()
        watched.read_gate.clear()
        first = call(engine, "first")
        await until(watched.reading.is_set)
        second = call(engine, "second")
        await until(lambda: len(engine._turns) == 1)
        doomed, others = (first, [second]) if stage == "is read" else (second, [first])
    doomed.cancel()
    with pytest.raises(asyncio.CancelledError):
        await doomed
    for each in (gate, watched.prepare_gate, watched.read_gate):
        each.set()
    assert [each.error for got in await asyncio.gather(*others) for each in got] == [None]
    assert (await engine.analyze(["after"]))[0].error is None
    await until(lambda: not engine._turns._busy)
    assert (len(engine._turns), engine.stats().queue_tokens) == (0, 0)
    assert not engine._models["default"].session.flights


async def test_a_deadline_that_is_no_number_is_refused(open_engine: Open) -> None:
    engine: Engine = await open_engine(EngineConfig(), loader=fake_loader(FakeBackend()))
    with pytest.raises(Permanent, match="deadline_s must be a number"):
        await engine.analyze(["text"], deadline_s=float("nan"))
