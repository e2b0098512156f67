"""Generation when memory runs out: requests under way get an error, no other one does, and it goes on."""

import asyncio
import logging
import queue
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from engine.config import EngineConfig, GenerationConfig
from engine.generation import Generator
from engine.generation_batched import ContinuousDriver
from engine.generation_choice import choose
from engine.generation_driver import Job, Tokens
from engine.generation_model import Generative, Prompt, load_generative
from engine.generation_plain import PlainDriver
from sluice.errors import Retryable
from tests.engine.generating import PROMPTS, plain, text_of, until

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    MemoryError("out of memory"),
]


class Short:
    """Loads a model whose steps run out of memory when the test says: once, or until further notice."""

    def __init__(self, error: BaseException = ERRORS[0]) -> None:
        self.error = error
        self.times = 0

    def __call__(self, config: EngineConfig) -> Generative:
        model = load_generative(config)
        forward = model.net.forward

        def step(*arguments: Any, **named: Any) -> Any:
            if self.times:
                self.times -= 1
                raise type(self.error)(*self.error.args)  # a new one: errors hold frames, and frames the cache
            return forward(*arguments, **named)

        model.net.forward = step
        return model


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("batching", "slots"), [("always", 2), ("auto", 2), ("never", 1)])
async def test_memory_that_runs_out_fails_what_is_under_way_and_nothing_else(
    open_generator: Callable[..., Any], generative: dict[str, Path], batching: str, slots: int, error: BaseException
) -> None:
    folder, short = generative["llama"], Short(error)
    generator: Generator = await open_generator(folder, short, batching=batching, batch_requests_max=2)
    chosen = generator.plan()["batching"]
    hit = [asyncio.ensure_future(text_of(generator.generate(PROMPTS[0], max_new_tokens=256))) for _ in range(slots)]
    await until(lambda: generator.stats().running == slots and generator.stats().new_tokens > 0)
    waiting = [asyncio.ensure_future(text_of(generator.generate(each, max_new_tokens=9))) for each in PROMPTS[1:4]]
    await until(lambda: generator.stats().waiting == len(waiting))
    short.times = 1
    for each in await asyncio.gather(*hit, return_exceptions=True):
        assert isinstance(each, Retryable), each
        assert "generation failed: " in str(each)
        assert "memory" in str(each)
    assert await asyncio.wait_for(asyncio.gather(*waiting), 60) == plain(folder, PROMPTS[1:4], 9)
    assert generator.ready
    assert generator.plan()["batching"] == chosen
    text = await text_of(generator.generate(PROMPTS[4], max_new_tokens=9))
    assert text == plain(folder, PROMPTS[4:5], 9)[0]
    stats = generator.stats()
    assert (stats.failed, stats.finished, stats.running, stats.tokens_running) == (slots, 4, 0, 0)


@pytest.mark.parametrize("batching", ["always", "auto"])
async def test_memory_that_stays_short_fails_requests_one_after_another_and_never_hangs(
    open_generator: Callable[..., Any], generative: dict[str, Path], monkeypatch: pytest.MonkeyPatch, batching: str
) -> None:
    cramped = [False]
    create = ContinuousBatchingManager._create_batch_processor

    def made(self: Any) -> Any:
        if cramped[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate the cache.")
        return create(self)

    monkeypatch.setattr(ContinuousBatchingManager, "_create_batch_processor", made)
    folder, short = generative["llama"], Short()
    generator: Generator = await open_generator(folder, short, batching=batching, batch_requests_max=1)
    for _ in range(3):
        short.times, cramped[0] = 1, True
        requests = [text_of(generator.generate(each, max_new_tokens=5)) for each in PROMPTS[:3]]
        ended = await asyncio.wait_for(asyncio.gather(*requests, return_exceptions=True), 60)
        assert isinstance(ended[0], Retryable)
        # Where it may, it goes on one by one.
        assert ended[1:] == plain(folder, PROMPTS[1:3], 5) or batching == "always"
        assert all(isinstance(each, str | Retryable) for each in ended)
    cramped[0], short.times = False, 0
    text = await asyncio.wait_for(text_of(generator.generate(PROMPTS[0], max_new_tokens=5)), 60)
    assert text == plain(folder, PROMPTS[:1], 5)[0]
    assert (generator.ready, generator.stats().running, generator.stats().tokens_running) == (True, 0, 0)


def test_a_batch_that_died_leaves_its_memory_and_the_model_as_it_was(
    generative: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What it logs holds the error, and pytest holds what is logged.
    monkeypatch.setattr(logging.getLogger("ContinuousBatchingLogger"), "disabled", True)
    short = Short()
    generation = GenerationConfig(model=str(generative["llama"]), prompt_tokens_max=300, new_tokens_max=64)
    model = short(EngineConfig(device="cpu", threads=1, generation=generation))
    model.net.set_attn_implementation("eager")
    reports: queue.SimpleQueue[list[Tokens]] = queue.SimpleQueue()
    driver = ContinuousDriver(model, reports.put)
    short.times = 1
    driver.submit(Job("a", Prompt([5, 6, 7]), 8))
    (report,) = reports.get(timeout=20)
    assert "out of memory" in report.error
    cache = weakref.ref(driver._manager.batch_processor.cache)
    driver.close()
    driver.close()
    assert cache() is None, "it would lie beside the next one's"
    assert model.net.config._attn_implementation == "eager"
    assert not driver.alive


def test_a_batch_that_finds_no_memory_leaves_the_model_as_it_was(
    generative: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    generation = GenerationConfig(model=str(generative["llama"]), prompt_tokens_max=300, new_tokens_max=64)
    model = load_generative(EngineConfig(device="cpu", threads=1, generation=generation))
    model.net.set_attn_implementation("eager")
    monkeypatch.setattr(ContinuousBatchingManager, "_create_batch_processor", short)
    driver = choose(model, lambda _: None)
    driver.close()
    assert isinstance(driver, PlainDriver)
    assert model.net.config._attn_implementation == "eager"
