"""Generation: plain transformers' text, many requests at once, within bounds."""

import asyncio
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import models
from engine.config import EngineConfig, GenerationConfig
from engine.failures import DeadlinePassed
from engine.generation import Generator
from engine.generation_model import load_generative
from engine.lane import Priority
from engine.loading import load
from sluice.errors import Backpressure, ConfigError, Permanent, Retryable
from tests.engine.fakes import FakeBackend, fake_loader
from tests.engine.generating import PROMPTS, first_piece, plain, text_of, until

BOTH = pytest.mark.parametrize("batching", ["always", "never"])


@pytest.mark.parametrize(
    ("name", "batching"), [("llama", "auto"), ("llama", "never"), ("penalty", "auto"), ("t5", "auto")]
)
async def test_greedy_text_equals_plain_generate_when_requests_join_in_mid_flight(
    open_generator: Callable[..., Any], generative: dict[str, Path], name: str, batching: str
) -> None:
    expected = plain(generative[name], PROMPTS, 24)
    assert len(set(expected)) > len(PROMPTS) / 2, "the model must tell prompts apart"
    generator: Generator = await open_generator(generative[name], batching=batching, batch_requests_max=5)
    early = [generator.generate(prompt, max_new_tokens=24) for prompt in PROMPTS[:3]]
    begun = [await first_piece(each) for each in early]
    late = [generator.generate(prompt, max_new_tokens=24) for prompt in PROMPTS[3:]]
    rests = await asyncio.gather(*map(text_of, [*early, *late]))
    texts = [*(one + rest for one, rest in zip(begun, rests[:3], strict=True)), *rests[3:]]
    assert texts == expected
    assert [answer.usage.finish for answer in (*early, *late)].count("") == 0
    continuous = name == "llama" and batching == "auto"
    assert generator.plan()["batching"].startswith("continuous, 5" if continuous else "one by one: ")
    assert generator.stats().finished == len(PROMPTS)
    assert (generator.stats().running, generator.stats().waiting, generator.stats().tokens_running) == (0, 0, 0)


async def test_sampling_beside_greedy_requests_changes_nothing_for_them(
    open_generator: Callable[..., Any], generative: dict[str, Path]
) -> None:
    expected = plain(generative["llama"], PROMPTS[:3], 30)
    generator: Generator = await open_generator(generative["llama"], batching="always")
    warm = [generator.generate(prompt, max_new_tokens=30, temperature=5.0) for prompt in PROMPTS[:3] * 2]
    cold = [generator.generate(prompt, max_new_tokens=30) for prompt in PROMPTS[:3]]
    texts = await asyncio.gather(*map(text_of, [*warm, *cold]))
    assert texts[6:] == expected
    assert len(set(texts[:6])) > 3


async def test_the_reason_of_the_end_and_the_tokens_are_told(
    open_generator: Callable[..., Any], generative: dict[str, Path]
) -> None:
    (whole,) = plain(generative["llama"], ["the disk is full"], 40)
    stop = whole[8:10]
    generator: Generator = await open_generator(generative["llama"])
    short = generator.generate("the disk is full", max_new_tokens=5)
    await text_of(short)
    assert (short.usage.finish, short.usage.new_tokens, short.usage.prompt_tokens) == ("length", 5, 16)
    stopped = generator.generate("the disk is full", max_new_tokens=40, stop=[stop, "never"])
    assert await text_of(stopped) == whole[: whole.find(stop)]
    assert stopped.usage.finish == "stop"
    chat = generator.generate("hi", max_new_tokens=3, chat=True)
    await text_of(chat)
    assert chat.usage.prompt_tokens == len("[user] hi\n[answer] ")


@BOTH
async def test_beyond_the_limit_calls_get_back_pressure_and_nothing_is_kept(
    open_generator: Callable[..., Any], generative: dict[str, Path], batching: str
) -> None:
    generator: Generator = await open_generator(
        generative["llama"], batching=batching, requests_max=2, batch_requests_max=1
    )
    running = [generator.generate(prompt, max_new_tokens=40) for prompt in PROMPTS[:2]]
    tasks = [asyncio.ensure_future(text_of(each)) for each in running]
    await asyncio.sleep(0)
    with pytest.raises(Backpressure, match=r"engine\.generation\.requests_max") as full:
        await text_of(generator.generate("one more"))
    assert 0 < full.value.retry_after_s <= 30
    await asyncio.gather(*tasks)
    assert await text_of(generator.generate("one more", max_new_tokens=3))


@BOTH
async def test_a_caller_that_goes_away_frees_its_place_at_once(
    open_generator: Callable[..., Any], generative: dict[str, Path], batching: str
) -> None:
    generator: Generator = await open_generator(generative["llama"], batching=batching, batch_requests_max=1)
    first = generator.generate(PROMPTS[0], max_new_tokens=256)
    await first_piece(first)
    waiting = asyncio.ensure_future(text_of(generator.generate(PROMPTS[1], max_new_tokens=4)))
    unseen = asyncio.ensure_future(text_of(generator.generate(PROMPTS[2], max_new_tokens=256)))
    await until(lambda: generator.stats().waiting == 2)
    unseen.cancel()
    await asyncio.wait([unseen])
    assert generator.stats().waiting == 1
    await first.aclose()
    assert generator.stats().dropped == 2
    assert await asyncio.wait_for(waiting, 20) == plain(generative["llama"], PROMPTS[1:2], 4)[0]
    assert first.usage.new_tokens < 256
    assert (generator.stats().running, generator.stats().tokens_running) == (0, 0)


async def test_an_answer_that_is_dropped_frees_its_place(
    open_generator: Callable[..., Any], generative: dict[str, Path]
) -> None:
    generator: Generator = await open_generator(generative["llama"])
    async for _ in generator.generate(PROMPTS[0], max_new_tokens=256):
        break
    await until(lambda: generator.stats().running == 0)
    assert generator.stats().dropped == 1


async def test_tokens_under_way_stay_within_the_cache_and_no_answer_suffers(
    open_generator: Callable[..., Any], generative: dict[str, Path]
) -> None:
    limits = {"cache_tokens_max": 320, "prompt_tokens_max": 260, "new_tokens_max": 60, "step_tokens_max": 20}
    generator: Generator = await open_generator(generative["llama"], batching="always", **limits)
    most = 0

    async def watched(prompt: str) -> str:
        nonlocal most
        pieces = []
        async for piece in generator.generate(prompt, max_new_tokens=20):
            pieces.append(piece)
            most = max(most, generator.stats().tokens_running)
        return "".join(pieces)

    assert await asyncio.gather(*map(watched, PROMPTS * 2)) == plain(generative["llama"], PROMPTS, 20) * 2
    assert 160 < most <= 320


@BOTH
async def test_a_deadline_ends_a_request_wherever_it_is_and_no_other(
    open_generator: Callable[..., Any], generative: dict[str, Path], batching: str
) -> None:
    generator: Generator = await open_generator(generative["llama"], batching=batching, batch_requests_max=2)
    expected = plain(generative["llama"], PROMPTS[:1], 120)[0]
    other = asyncio.ensure_future(text_of(generator.generate(PROMPTS[0], max_new_tokens=120)))
    late = [generator.generate(prompt, max_new_tokens=256, deadline_s=0.03) for prompt in PROMPTS[1:]]
    for ended in await asyncio.gather(*map(text_of, late), return_exceptions=True):
        assert isinstance(ended, DeadlinePassed)
    with pytest.raises(DeadlinePassed, match="its deadline passed before"):
        await text_of(generator.generate("x", deadline_s=-1))
    assert await other == expected
    assert generator.stats().failed == 6


@BOTH
async def test_online_requests_overtake_background_ones_that_have_not_waited_long(
    open_generator: Callable[..., Any], generative: dict[str, Path], batching: str
) -> None:
    async def order(wait_s: float) -> list[str]:
        generator: Generator = await open_generator(
            generative["llama"], batching=batching, batch_requests_max=1, background_wait_s=wait_s
        )
        ended: list[str] = []

        async def run(name: str, priority: Priority) -> None:
            await text_of(generator.generate(PROMPTS[1], max_new_tokens=4, priority=priority))
            ended.append(name)

        first = generator.generate(PROMPTS[0], max_new_tokens=60)
        await first_piece(first)
        tasks = [asyncio.ensure_future(run("background", Priority.BACKGROUND))]
        await until(lambda: generator.stats().waiting == 1)
        tasks.append(asyncio.ensure_future(run("online", Priority.ONLINE)))
        await text_of(first)
        await asyncio.gather(*tasks)
        return ended

    assert await order(10.0) == ["online", "background"]
    assert await order(1e-9) == ["background", "online"]


@BOTH
async def test_closing_ends_all_requests_with_an_error_and_all_threads(
    open_generator: Callable[..., Any], generative: dict[str, Path], batching: str
) -> None:
    before = set(threading.enumerate())
    generator: Generator = await open_generator(generative["llama"], batching=batching, batch_requests_max=2)
    answers = [generator.generate(prompt, max_new_tokens=256) for prompt in PROMPTS]
    tasks = [asyncio.ensure_future(text_of(each)) for each in answers]
    await until(lambda: generator.stats().new_tokens > 0)
    await generator.close()
    await generator.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(each, Retryable) for each in results)
    others = re.compile("asyncio_|.*tqdm")  # the event loop's own threads, and transformers' progress bars
    assert not {each for each in threading.enumerate() if each not in before and not others.match(each.name)}
    with pytest.raises(Retryable, match="closed"):
        await text_of(generator.generate("x"))


async def test_draining_lets_requests_end(open_generator: Callable[..., Any], generative: dict[str, Path]) -> None:
    generator: Generator = await open_generator(generative["llama"])
    answer = generator.generate(PROMPTS[0], max_new_tokens=50)
    begun = await first_piece(answer)
    rest = asyncio.ensure_future(text_of(answer))
    await generator.drain(20)
    assert begun + await rest == plain(generative["llama"], PROMPTS[:1], 50)[0]
    assert not generator.ready


@BOTH
async def test_a_failing_device_fails_its_requests_and_the_next_ones_work(
    open_generator: Callable[..., Any], generative: dict[str, Path], batching: str
) -> None:
    failing = threading.Event()

    def load(config: EngineConfig) -> Any:
        model = load_generative(config)
        forward = model.net.forward

        def broken(*arguments: Any, **named: Any) -> Any:
            if failing.is_set():
                raise RuntimeError("the device is gone")
            return forward(*arguments, **named)

        model.net.forward = broken
        return model

    generator: Generator = await open_generator(generative["llama"], load, batching=batching)
    failing.set()
    answers = [generator.generate(prompt, max_new_tokens=50) for prompt in PROMPTS[:3]]
    results = await asyncio.gather(*map(text_of, answers), return_exceptions=True)
    assert all(isinstance(each, Retryable) and "generation failed" in str(each) for each in results)
    failing.clear()
    assert (
        await text_of(generator.generate(PROMPTS[1], max_new_tokens=5))
        == plain(generative["llama"], PROMPTS[1:2], 5)[0]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "prompt: empty text"),
        ({"prompt": "\ud800"}, "prompt: not valid Unicode"),
        ({"prompt": "x" * 400}, r"prompt of 400 tokens exceeds 300 \(engine.generation.prompt_tokens_max"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens 0 is not in 1 to 256"),
        ({"prompt": "x", "max_new_tokens": 257}, "engine.generation.new_tokens_max"),
        ({"prompt": "x", "temperature": -1.0}, "temperature -1.0"),
        ({"prompt": "x", "temperature": 1e-40}, "temperature 1e-40 is neither 0 nor in 0.01 to 10.0"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature nan"),
        ({"prompt": "x", "stop": [""]}, "stop: at most"),
        ({"prompt": "x", "images": [b"..."]}, "takes text alone; images need an image-text model"),
    ],
)
async def test_what_cannot_be_answered_is_refused_alone(
    open_generator: Callable[..., Any], generative: dict[str, Path], arguments: dict[str, Any], message: str
) -> None:
    generator: Generator = await open_generator(generative["llama"], batching="never")
    good = generator.generate("x", max_new_tokens=2)
    with pytest.raises(Permanent, match=message):
        await text_of(generator.generate(**arguments))
    assert await text_of(good) is not None
    assert good.usage.new_tokens == 2


async def test_an_answer_ends_where_the_model_cannot_see_more(
    open_generator: Callable[..., Any], generative: dict[str, Path]
) -> None:
    generator: Generator = await open_generator(generative["llama"], prompt_tokens_max=600, new_tokens_max=100)
    answer = generator.generate("x" * 480, max_new_tokens=100)
    await text_of(answer)
    assert (answer.usage.new_tokens, answer.usage.finish) == (32, "length")
    with pytest.raises(Permanent, match="prompt of 512 tokens exceeds 511"):
        await text_of(generator.generate("x" * 512))


async def test_the_wrong_kind_of_model_is_told_with_what_it_offers(
    generative: dict[str, Path], tiny_models: dict[str, Path]
) -> None:
    for name, offers in (("bert", "embed, classify, novelty"), ("head", "classify"), ("ner", "tokens")):
        generator = Generator(EngineConfig(model=str(tiny_models[name]), device="cpu"))
        with pytest.raises(Permanent, match=f"generates no text: it offers {offers}.*, and not generate"):
            await generator.start()
        await generator.close()
    with pytest.raises(Permanent, match="it offers generate, and none of embed, classify, novelty and tokens"):
        load(EngineConfig(model=str(generative["llama"]), device="cpu"))
    assert models.read_card("m", generative["llava"]).kind == "generation"


async def test_an_engine_generates_beside_its_tasks_and_replaces_the_model_while_it_works(
    open_engine: Callable[..., Any], generative: dict[str, Path]
) -> None:
    def section(name: str, **changes: Any) -> EngineConfig:
        return EngineConfig(
            device="cpu", threads=1, generation=GenerationConfig(model=str(generative[name]), **changes)
        )

    engine = await open_engine(section("llama"), loader=fake_loader(FakeBackend()))
    assert engine.ready
    answer = engine.generator.generate(PROMPTS[0], max_new_tokens=50)
    begun = await first_piece(answer)
    rest = asyncio.ensure_future(text_of(answer))
    assert (await engine.analyze(["disk"]))[0].label
    assert await engine.reload(section("penalty")) == ["generation"]
    assert begun + await rest == plain(generative["llama"], PROMPTS[:1], 50)[0]
    text = await text_of(engine.generator.generate(PROMPTS[0], max_new_tokens=5))
    assert text == plain(generative["penalty"], PROMPTS[:1], 5)[0]
    generator = engine.generator
    await engine.close()
    assert not generator.ready


async def test_an_engine_without_a_generative_model_says_how_to_get_one(open_engine: Callable[..., Any]) -> None:
    engine = await open_engine(EngineConfig(), loader=fake_loader(FakeBackend()))
    with pytest.raises(Permanent, match=r"set engine\.generation\.model"):
        engine.generator.generate("x")
    await engine.close()
    with pytest.raises(Retryable, match="the engine is closed"):
        engine.generator.generate("x")


async def test_always_batching_a_model_that_cannot_be_is_an_error(generative: dict[str, Path]) -> None:
    section = GenerationConfig(batching="always")
    generator = Generator(EngineConfig(model=str(generative["penalty"]), device="cpu", generation=section))
    with pytest.raises(Permanent, match=r"is 'always', but .*RepetitionPenaltyLogitsProcessor"):
        await generator.start()
    await generator.close()


def test_a_cache_that_cannot_hold_a_request_is_refused() -> None:
    with pytest.raises(ConfigError, match="cache_tokens_max: must hold at least one request"):
        GenerationConfig(prompt_tokens_max=1000, new_tokens_max=1000, cache_tokens_max=1999)


async def test_closing_while_the_model_is_loaded_leaves_the_event_loop_free() -> None:
    begun, goes_on = threading.Event(), threading.Event()
    seen: list[bool] = []

    def slow(_: EngineConfig) -> Any:
        begun.set()
        seen.append(goes_on.wait(5))
        raise Permanent("enough")

    generator = Generator(EngineConfig(), slow)
    start = asyncio.create_task(generator.start())
    await until(begun.is_set)
    start.cancel()
    close = asyncio.create_task(generator.close())
    await asyncio.wait([start])
    goes_on.set()
    await close
    assert seen == [True]
