"""The model that generates text as a part of an engine: replaced while it works, and its figures as metrics."""

import asyncio
import io
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig, GenerationConfig, ModelConfig
from engine.generation import Generator
from engine.generation_model import Generative, Prompt
from engine.generation_stats import GenerationMeter
from engine.lane import Priority
from engine.service import Engine
from sluice.connections import TelemetryConfig
from sluice.errors import Backpressure, ConfigError, Permanent, Retryable
from sluice.telemetry import Telemetry
from tests.engine.fakes import FakeBackend, fake_loader
from tests.engine.generating import PROMPTS, first_piece, plain, text_of, until


def section(folder: Path | str, swap_drain_s: float = 60.0, **limits: Any) -> EngineConfig:
    small = {"cache_tokens_max": 4096, "prompt_tokens_max": 300, "new_tokens_max": 256}
    generation = GenerationConfig(model=str(folder), **{**small, **limits})
    return EngineConfig(device="cpu", threads=1, generation=generation, swap_drain_s=swap_drain_s)


@pytest.fixture
def open_generating(open_engine: Callable[..., Any]) -> Callable[..., Any]:
    """Starts engines whose other model costs nothing."""

    async def start(config: EngineConfig) -> Engine:
        engine: Engine = await open_engine(config, loader=fake_loader(FakeBackend()))
        return engine

    return start


async def test_a_swap_drops_no_text_and_the_next_model_has_all_new_ones(
    open_generating: Callable[..., Any], generative: dict[str, Path]
) -> None:
    engine: Engine = await open_generating(section(generative["llama"]))
    old = engine.generator
    # It holds its place until it was read to its end.
    answer = old.generate(PROMPTS[0], max_new_tokens=200)
    begun = await first_piece(answer)
    swap = asyncio.create_task(engine.swap("generation", str(generative["penalty"])))
    await until(lambda: engine.generator is not old)
    assert engine.ready
    text = await text_of(engine.generator.generate(PROMPTS[0], max_new_tokens=20))
    assert text == plain(generative["penalty"], PROMPTS[:1], 20)[0]
    assert not swap.done()
    assert begun + await text_of(answer) == plain(generative["llama"], PROMPTS[:1], 200)[0]
    assert await swap == engine.generator.model_version != old.model_version
    with pytest.raises(Retryable, match="draining"):
        await text_of(old.generate("x"))
    assert await engine.reload(section(generative["penalty"])) == []


async def test_a_request_whose_prompt_is_being_read_is_not_lost_either(
    open_generator: Callable[..., Any], generative: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go_on = threading.Event(), threading.Event()
    read = Generative.read

    def slow(self: Generative, *arguments: Any) -> Prompt:
        reading.set()
        assert go_on.wait(20)
        return read(self, *arguments)

    monkeypatch.setattr(Generative, "read", slow)
    generator: Generator = await open_generator(generative["llama"])
    text = asyncio.ensure_future(text_of(generator.generate(PROMPTS[0], max_new_tokens=8)))
    await until(reading.is_set)
    drained = asyncio.ensure_future(generator.drain(20))
    await until(lambda: not generator.ready)
    go_on.set()
    assert await text == plain(generative["llama"], PROMPTS[:1], 8)[0]
    await drained


async def test_a_model_that_cannot_be_loaded_leaves_the_old_one_in_place(
    open_generating: Callable[..., Any], generative: dict[str, Path], tiny_models: dict[str, Path]
) -> None:
    engine: Engine = await open_generating(section(generative["llama"]))
    before = engine.generator
    with pytest.raises(Permanent, match="was not found"):
        await engine.swap("generation", "no-such-model")
    with pytest.raises(Permanent, match="generates no text"):
        await engine.reload(section(tiny_models["bert"]))
    assert engine.generator is before
    assert engine.ready
    assert await text_of(before.generate(PROMPTS[0], max_new_tokens=5)) == plain(generative["llama"], PROMPTS[:1], 5)[0]


async def test_what_is_not_there_cannot_be_swapped_and_the_name_is_taken(open_generating: Callable[..., Any]) -> None:
    engine: Engine = await open_generating(EngineConfig())
    with pytest.raises(Permanent, match="there is no model 'generation'; there are default"):
        await engine.swap("generation", "x")
    with pytest.raises(ConfigError, match="must not be 'default' or 'generation'"):
        EngineConfig(models={"generation": ModelConfig(model="x")})


async def test_a_text_that_outlasts_the_swap_gets_an_error(
    open_generating: Callable[..., Any], generative: dict[str, Path]
) -> None:
    engine: Engine = await open_generating(section(generative["llama"], swap_drain_s=0.05))
    answer = engine.generator.generate(PROMPTS[0], max_new_tokens=256)
    await first_piece(answer)
    await engine.swap("generation", str(generative["penalty"]))
    with pytest.raises(Retryable, match="the generator closes"):
        await text_of(answer)


async def test_an_engine_that_closes_in_the_midst_of_a_swap_ends_both_models(
    open_generating: Callable[..., Any], generative: dict[str, Path]
) -> None:
    engine: Engine = await open_generating(section(generative["llama"]))
    old = engine.generator
    answer = old.generate(PROMPTS[0], max_new_tokens=256)
    await first_piece(answer)
    swap = asyncio.create_task(engine.swap("generation", str(generative["penalty"])))
    await until(lambda: engine.generator is not old)
    new = engine.generator
    await engine.close()
    await asyncio.wait_for(swap, 20)
    assert (old.levels(), old._driver, new._driver) == ((0, 0, 0), None, None)
    with pytest.raises(Retryable, match="the generator closes"):
        await text_of(answer)


async def test_a_reload_takes_over_changed_files_and_a_model_that_has_ended(
    open_generating: Callable[..., Any], generative: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(generative["llama"], tmp_path / "model"))
    engine: Engine = await open_generating(section(folder))
    assert await engine.reload(section(folder)) == []
    before = engine.generator.model_version
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"top_k": 7}))
    assert await engine.reload(section(folder)) == ["generation"]
    assert engine.generator.model_version != before
    await engine.generator.close()
    assert not engine.ready
    assert await engine.reload(section(folder)) == ["generation"]
    assert await engine.reload(EngineConfig(device="cpu", threads=1)) == ["generation"]
    assert engine.ready
    with pytest.raises(Permanent, match=r"engine\.generation\.model"):
        engine.generator.generate("x")


async def test_the_figures_are_metrics_and_go_on_over_a_swap(generative: dict[str, Path]) -> None:
    telemetry = Telemetry("test", TelemetryConfig(log_level="error"), stream=io.StringIO())
    meter = GenerationMeter(telemetry)

    def value(name: str, **labels: str) -> float:
        return telemetry.registry.get_sample_value(f"sluice_engine_generation{name}", labels) or 0.0

    limits = {"requests_max": 2, "batch_requests_max": 1}
    first = Generator(section(generative["llama"], **limits), meter=meter)
    await first.start()
    answer = first.generate(PROMPTS[0], max_new_tokens=200, priority=Priority.ONLINE)
    await first_piece(answer)
    waiting = asyncio.ensure_future(text_of(first.generate(PROMPTS[1], max_new_tokens=7)))
    await until(lambda: first.stats().waiting == 1)
    assert (value("s_waiting"), value("s_running"), value("_held_tokens")) == (1, 1, 224)
    with pytest.raises(Backpressure):
        await text_of(first.generate("x"))
    await answer.aclose()
    await waiting
    with pytest.raises(Permanent):
        await text_of(first.generate(""))
    await first.close()
    second = Generator(section(generative["llama"], **limits), meter=meter)
    await second.start()
    await text_of(second.generate(PROMPTS[1], max_new_tokens=5))
    assert meter._watched == (second,), "one that was replaced is not kept in memory"
    assert (value("s_waiting"), value("s_running"), value("_held_tokens")) == (0, 0, 0)
    await second.close()
    ended = {
        (outcome, priority): value("s_total", outcome=outcome, priority=priority)
        for outcome in ("finished", "failed", "dropped", "refused")
        for priority in ("online", "background")
    }
    assert {key: count for key, count in ended.items() if count} == {
        ("finished", "background"): 2,
        ("failed", "background"): 1,
        ("refused", "background"): 1,
        ("dropped", "online"): 1,
    }
    stats = second.stats()
    assert (stats.finished, stats.failed, stats.refused, stats.dropped) == (2, 1, 1, 1)
    assert value("_tokens_total", kind="prompt") == stats.prompt_tokens == len(PROMPTS[0]) + 2 * len(PROMPTS[1])
    assert value("_tokens_total", kind="new") == stats.new_tokens > 12
    assert value("_first_token_seconds_count", priority="online") == 1
    assert value("_first_token_seconds_count", priority="background") == 2
    assert 0 < value("_first_token_seconds_sum", priority="background") < 60
    assert value("_token_seconds_count") == 2
    assert 0 < value("_token_seconds_sum") < 10
