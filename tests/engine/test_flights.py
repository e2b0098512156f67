"""Who waits for what: non-finite outputs, deadlines that move, and the order in which chunks get room."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engine.backend import DeviceLost
from engine.config import CacheConfig, EngineConfig
from engine.service import Engine, Priority
from sluice.errors import Backpressure
from tests.engine.fakes import Again, FakeBackend, byte_tokenizer, fake_loader

NO_CACHES = CacheConfig(token_bytes_max=0, result_bytes_max=0)
Open = Callable[..., Any]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - figures of the engine have no event to wait on
            await asyncio.sleep(0.001)


@dataclass
class Blind(FakeBackend):
    """What holds the mark has an output that is no number."""

    mark: int = -1
    value: float = float("nan")

    def collect(self, ticket: object) -> list[npt.NDArray[np.float16]]:
        assert isinstance(ticket, list)
        rows = super().collect(ticket)
        for ids, row in zip(ticket, rows, strict=True):
            if self.mark in ids:
                row[3] = self.value
        return rows


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_an_output_that_is_no_number_is_an_error_of_that_text_and_never_kept(
    open_engine: Open, value: float
) -> None:
    backend = Blind(mark=int(byte_tokenizer().encode(["~"])[0].ids[1]), value=value)
    engine: Engine = await open_engine(EngineConfig(), loader=fake_loader(backend))
    await engine.analyze([f"usual {i % 3}" for i in range(200)], stream="s")
    for _ in range(2):
        got = await engine.analyze(["usual 1", "bad ~", "usual 2"], stream="s")
        assert [each.reason for each in got] == ["", "device", ""]
        assert "not finite" in str(got[1].error)
    # The text was computed both times: nothing of it was kept; and the stream still sees what is new.
    assert engine.stats().texts_computed == 3 + 2
    (new,) = await engine.analyze(["QQQQQQQQ"], stream="s")
    assert new.novelty > 0.2


@dataclass
class Dies(FakeBackend):
    """The first batch after it was armed takes the device with it, when the test lets it."""

    armed: bool = False

    def collect(self, ticket: object) -> list[npt.NDArray[np.float16]]:
        if not self.armed:
            return super().collect(ticket)
        self.started.set()
        assert self.gate is not None
        assert self.gate.wait(20)
        raise DeviceLost("gone")


async def test_who_has_time_is_not_told_of_anothers_deadline_when_a_device_dies(open_engine: Open) -> None:
    backend = Dies()
    gate = threading.Event()

    def load(config: EngineConfig) -> Any:
        loaded = fake_loader(backend)(config)
        backend.armed, backend.gate = True, gate
        loaded.devices[0].reopen = Again(FakeBackend)
        return loaded

    engine: Engine = await open_engine(EngineConfig(caches=NO_CACHES, worker_restart_s_first=0.01), loader=load)
    hurried = asyncio.create_task(engine.analyze(["same"], deadline_s=0.1))
    await until(backend.started.is_set)
    patient = asyncio.create_task(engine.analyze(["same"]))
    await until(lambda: engine.stats().texts_coalesced == 1)
    assert (await hurried)[0].reason == "deadline"
    gate.set()
    assert (await patient)[0].error is None


async def test_a_waiting_chunk_is_not_overtaken_by_later_calls_of_its_priority(open_engine: Open) -> None:
    gate = threading.Event()
    backend = FakeBackend(gate=gate)
    config = EngineConfig(queue_tokens_max=1000, chunk_texts=10, batch_tokens=64, caches=NO_CACHES, calls_in_line_max=1)
    engine: Engine = await open_engine(config, loader=fake_loader(backend))

    def big(count: int) -> Sequence[str]:
        return [f"{i:03}" + "y" * 45 for i in range(count)]

    running = asyncio.create_task(engine.analyze(["running"]))
    await until(backend.started.is_set)
    # A chunk takes 500 tokens: the second one waits for room.
    large = asyncio.create_task(engine.analyze(big(30)))
    await until(lambda: engine.stats().queue_tokens == 500)
    await until(lambda: any(engine._models["default"].session.flights._lines.values()))
    with pytest.raises(Backpressure, match="calls_in_line_max") as refused:
        await engine.analyze(["small"])
    assert refused.value.retry_after_s > 0
    online = asyncio.create_task(engine.analyze(["at once"], priority=Priority.ONLINE))
    await until(lambda: engine.stats().queue_tokens > 500)
    gate.set()
    for call in (running, large, online):
        assert [each.error for each in await call if each.error] == []
    assert (await engine.analyze(["small"]))[0].error is None


async def test_small_calls_line_up_behind_a_large_ones_chunk_and_end_before_it(open_engine: Open) -> None:
    gate = threading.Event()
    backend = FakeBackend(gate=gate)
    config = EngineConfig(queue_tokens_max=1000, chunk_texts=10, batch_tokens=64, caches=NO_CACHES)
    engine: Engine = await open_engine(config, loader=fake_loader(backend))
    ended: list[str] = []

    async def call(name: str, texts: Sequence[str]) -> None:
        assert [each.error for each in await engine.analyze(texts) if each.error] == []
        ended.append(name)

    running = asyncio.create_task(call("running", ["running"]))
    await until(backend.started.is_set)
    calls = [running, asyncio.create_task(call("large", [f"{i:03}" + "y" * 45 for i in range(100)]))]
    line = engine._models["default"].session.flights._lines[Priority.BACKGROUND]
    await until(lambda: len(line) == 1)
    for i in range(8):
        calls.append(asyncio.create_task(call("small", [f"small {i}"])))
        await until(lambda i=i: len(line) == 2 + i)  # type: ignore[misc]
    gate.set()
    await asyncio.gather(*calls)
    assert ended[-1] == "large"
    assert not line


async def test_a_cancelled_chunk_leaves_the_line(open_engine: Open) -> None:
    gate = threading.Event()
    backend = FakeBackend(gate=gate)
    config = EngineConfig(queue_tokens_max=1000, chunk_texts=10, batch_tokens=64, caches=NO_CACHES)
    engine: Engine = await open_engine(config, loader=fake_loader(backend))
    running = asyncio.create_task(engine.analyze(["running"]))
    await until(backend.started.is_set)
    large = asyncio.create_task(engine.analyze([f"{i:03}" + "y" * 45 for i in range(30)]))
    lines = engine._models["default"].session.flights._lines
    await until(lambda: any(lines.values()))
    large.cancel()
    await asyncio.wait([large])
    assert not any(lines.values())
    small = asyncio.create_task(engine.analyze(["small"]))
    await until(lambda: engine.stats().queue_tokens == len("small") + 2)
    gate.set()
    assert (await small)[0].error is None
    await running


async def test_results_of_a_huge_call_are_read_in_pieces(open_engine: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.analysis import Reading

    sizes = []
    read = Reading.read

    def watched(self: Reading, outcomes: Sequence[Any], texts: Sequence[str]) -> Any:
        sizes.append(len(texts))
        return read(self, outcomes, texts)

    monkeypatch.setattr(Reading, "read", watched)
    engine: Engine = await open_engine(EngineConfig(chunk_texts=16), loader=fake_loader(FakeBackend()))
    got = await engine.analyze([f"text {i % 7}" for i in range(100)])
    assert len(got) == 100
    assert sizes == [16] * 6 + [4]
