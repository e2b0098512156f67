"""`Feed.Generate`: text over gRPC, within bounds, with a status for whatever goes wrong."""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from engine.config import EngineConfig, GenerationConfig
from engine.failures import DeadlinePassed
from engine.lane import Priority
from engine.service import Engine
from protos import feed_pb2
from sluice.connections import TelemetryConfig
from sluice.errors import Backpressure, MissingExtra, Permanent, Retryable
from sluice.telemetry import Telemetry
from tests.central.feed_support import TIMEOUT_S, Topics, running_feed, stub, until
from tests.central.generate_support import Scripted
from tests.engine import tiny_generation
from tests.engine.fakes import FakeBackend, fake_loader
from tests.engine.generating import plain

Request = feed_pb2.GenerateRequest
End = feed_pb2.GenerateEnd
PROMPT = "the disk is full"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_generation.build_all(tmp_path_factory.mktemp("generative"))["llama"]


@pytest.fixture
async def engine(llama: Path) -> AsyncIterator[Engine]:
    """The real one, with a small generative model of which one request is generated at a time."""
    limits = {"cache_tokens_max": 4096, "prompt_tokens_max": 300, "new_tokens_max": 480}
    section = GenerationConfig(model=str(llama), batch_requests_max=1, **limits)
    async with opened(EngineConfig(device="cpu", threads=1, generation=section)) as found:
        yield found


@contextlib.asynccontextmanager
async def opened(config: EngineConfig) -> AsyncIterator[Engine]:
    telemetry = Telemetry("test", TelemetryConfig(log_level="error"), stream=io.StringIO())
    engine = Engine(config, telemetry, loader=fake_loader(FakeBackend()))
    try:
        await engine.start()
        yield engine
    finally:
        await engine.close()


@pytest.fixture
def scripted() -> Scripted:
    return Scripted("The ", "disk ", "is full.")


@pytest.fixture
async def client(topics: Topics, tmp_path: Path, scripted: Scripted) -> AsyncIterator[Any]:
    settings = {"generate_calls_max": 3, "generate_deadline_ms": 77_000}
    async with running_feed(topics, tmp_path, scripted, **settings) as (_, target), stub(target) as found:
        yield found


async def read(call: Any) -> Any:
    return await asyncio.wait_for(call.read(), TIMEOUT_S)


async def refusal(call: Any) -> tuple[grpc.StatusCode, str, dict[str, Any]]:
    """How a call ends, after all that came."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await _whole(call)
    return refused.value.code(), refused.value.details() or "", dict(refused.value.trailing_metadata() or ())


async def test_the_text_of_the_model_comes_in_pieces_and_the_last_message_says_how_it_ended(
    topics: Topics, tmp_path: Path, engine: Engine, llama: Path
) -> None:
    (expected,) = plain(llama, [PROMPT], 24)
    async with running_feed(topics, tmp_path, engine) as (_, target), stub(target) as client:
        messages = [each async for each in client.Generate(Request(prompt=PROMPT, max_new_tokens=24))]
        assert "".join(each.text for each in messages) == expected
        assert [each.HasField("end") for each in messages] == [False] * (len(messages) - 1) + [True]
        end = messages[-1].end
        assert (end.finish, end.prompt_tokens, end.new_tokens) == (End.FINISH_LENGTH, len(PROMPT), 24)
        assert (end.model, end.model_version) == (str(llama), engine.generator.model_version)
        stop = expected[8:10]
        *pieces, last = [each async for each in client.Generate(Request(prompt=PROMPT, max_new_tokens=24, stop=[stop]))]
        assert "".join(each.text for each in pieces) == expected[: expected.find(stop)]
        assert last.end.finish == End.FINISH_STOP


async def test_everything_that_is_asked_for_reaches_the_generator(client: Any, scripted: Scripted) -> None:
    asked = Request(
        prompt="look",
        images=[b"\x89PNG", b"GIF"],
        chat=True,
        max_new_tokens=9,
        temperature=0.5,
        stop=["\n", "."],
        priority=feed_pb2.PRIORITY_BACKGROUND,
        deadline_ms=1500,
    )
    messages = [each async for each in client.Generate(asked)]
    assert [each.text for each in messages] == ["The ", "disk ", "is full.", ""]
    assert messages[-1].end == End(
        finish=End.FINISH_END, prompt_tokens=3, new_tokens=3, model="/models/small", model_version="abc"
    )
    assert [each async for each in client.Generate(Request(prompt="x"))]
    (first, arguments), (second, defaults) = scripted.asked
    assert (first, second) == ("look", "x")
    assert (list(arguments["images"]), list(arguments["stop"])) == ([b"\x89PNG", b"GIF"], ["\n", "."])
    assert (arguments["chat"], arguments["max_new_tokens"], arguments["temperature"]) == (True, 9, 0.5)
    assert (arguments["priority"], arguments["deadline_s"]) == (Priority.BACKGROUND, 1.5)
    assert (defaults["priority"], defaults["deadline_s"], defaults["max_new_tokens"]) == (Priority.ONLINE, 77.0, None)


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (Backpressure("the queue is full", retry_after_s=1.5), "RESOURCE_EXHAUSTED", "full; try again in 1.5 s"),
        (Permanent("prompt: empty text"), "INVALID_ARGUMENT", "prompt: empty text"),
        (MissingExtra("vision", "PIL"), "FAILED_PRECONDITION", "sluice-stream[vision]"),
        (DeadlinePassed("its deadline passed"), "DEADLINE_EXCEEDED", "its deadline passed"),
        (Retryable("the device is gone"), "UNAVAILABLE", "the device is gone"),
        (ZeroDivisionError("a bug"), "INTERNAL", "ZeroDivisionError('a bug')"),
    ],
)
async def test_each_kind_of_trouble_has_its_status_behind_the_text_that_came(
    client: Any, scripted: Scripted, raised: Exception, code: str, text: str
) -> None:
    scripted.raises = raised
    call = client.Generate(Request(prompt="x"))
    assert [(await read(call)).text for _ in range(3)] == ["The ", "disk ", "is full."]
    found, detail, trailers = await refusal(call)
    assert (found.name, text in detail) == (code, True), detail
    assert trailers.get("retry-after-ms") == ("1500" if isinstance(raised, Backpressure) else None)
    scripted.raises = None
    assert len([each async for each in client.Generate(Request(prompt="x"))]) == 4


async def test_without_a_generative_model_it_says_which_key_names_one(topics: Topics, tmp_path: Path) -> None:
    async with (
        opened(EngineConfig()) as engine,
        running_feed(topics, tmp_path, engine) as (_, target),
        stub(target) as client,
    ):
        code, detail, _ = await refusal(client.Generate(Request(prompt="x")))
        assert (code.name, "engine.generation.model" in detail) == ("FAILED_PRECONDITION", True)
        await engine.close()
        code, detail, _ = await refusal(client.Generate(Request(prompt="x")))
        assert (code.name, detail) == ("UNAVAILABLE", "the engine is closed")


async def test_without_an_engine_it_says_so(topics: Topics, tmp_path: Path) -> None:
    async with running_feed(topics, tmp_path) as (_, target), stub(target) as client:
        code, _, _ = await refusal(client.Generate(Request(prompt="x")))
        assert code is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("leave", ["cancel", "go away"])
async def test_a_client_that_leaves_frees_its_place_at_once(
    topics: Topics, tmp_path: Path, engine: Engine, leave: str
) -> None:
    generator = engine.generator
    async with running_feed(topics, tmp_path, engine) as (feed, target), stub(target) as client:
        async with stub(target, **{"grpc.use_local_subchannel_pool": 1}) as other:
            call = other.Generate(Request(prompt=PROMPT, max_new_tokens=480))
            assert (await read(call)).text
            waiting = asyncio.ensure_future(_whole(client.Generate(Request(prompt=PROMPT, max_new_tokens=4))))
            if leave == "cancel":
                call.cancel()
        assert (await asyncio.wait_for(waiting, TIMEOUT_S)).end.new_tokens == 4
        await until(lambda: generator.levels() == (0, 0, 0), "nothing is under way")
        assert generator.stats().dropped == 1
        assert generator.stats().new_tokens < 480
        await until(lambda: feed._generate_calls == 0, "the feed has forgotten it")


async def test_a_client_whose_own_deadline_passes_frees_its_place(client: Any, scripted: Scripted) -> None:
    scripted.gate.clear()
    call = client.Generate(Request(prompt="x"), timeout=0.3)
    assert (await read(call)).text == "The "
    code, _, _ = await refusal(call)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: scripted.left == 1, "the text was left")


async def _whole(call: Any) -> feed_pb2.GenerateResponse:
    """The last message."""
    last = None
    while (message := await read(call)) is not grpc.aio.EOF:
        last = message
    assert last is not None, "the stream ended without a message"
    return last


async def test_a_text_that_is_not_complete_in_time_ends_with_a_status(
    topics: Topics, tmp_path: Path, engine: Engine
) -> None:
    async with running_feed(topics, tmp_path, engine, generate_deadline_ms=30) as (_, target), stub(target) as client:
        code, detail, _ = await refusal(client.Generate(Request(prompt=PROMPT, max_new_tokens=480)))
        assert (code.name, "deadline passed" in detail) == ("DEADLINE_EXCEEDED", True)
        code, detail, _ = await refusal(client.Generate(Request(prompt="")))
        assert (code.name, "prompt: empty text" in detail) == ("INVALID_ARGUMENT", True)
        code, detail, _ = await refusal(client.Generate(Request(prompt="x", priority=9)))
        assert (code.name, detail) == ("INVALID_ARGUMENT", "unknown priority 9")


async def test_a_client_that_takes_nothing_is_cut_off_and_its_place_is_free(topics: Topics, tmp_path: Path) -> None:
    endless = Scripted(*["x" * 100_000] * 1000)
    async with running_feed(topics, tmp_path, endless, stall_deadline_s=0.2) as (_, target), stub(target) as client:
        call = client.Generate(Request(prompt="x"))
        assert (await read(call)).text
        await until(lambda: endless.left == 1, "the text was left")
        code, detail, _ = await refusal(call)
        assert (code.name, "nothing was taken for 0.2 s" in detail) == ("RESOURCE_EXHAUSTED", True)


async def test_more_calls_than_are_allowed_are_refused_with_a_delay(client: Any, scripted: Scripted) -> None:
    scripted.gate.clear()
    calls = [client.Generate(Request(prompt=str(i))) for i in range(3)]
    reading = [asyncio.ensure_future(_whole(call)) for call in calls]
    await until(lambda: scripted.running == 3, "all three are under way")
    code, detail, trailers = await refusal(client.Generate(Request(prompt="one more")))
    assert (code.name, "feed.generate_calls_max" in detail) == ("RESOURCE_EXHAUSTED", True)
    assert trailers["retry-after-ms"] == "1000"
    scripted.gate.set()
    assert all([(await each).HasField("end") for each in reading])


async def test_a_request_that_is_too_large_is_refused(topics: Topics, tmp_path: Path, scripted: Scripted) -> None:
    async with running_feed(topics, tmp_path, scripted, request_bytes_max=2048) as (_, target), stub(target) as client:
        code, _, trailers = await refusal(client.Generate(Request(prompt="x", images=[bytes(4096)])))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "retry-after-ms" not in trailers
        assert not scripted.asked


async def test_drain_lets_a_text_end_and_refuses_the_next(
    topics: Topics, tmp_path: Path, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("central.feed.LAST_MESSAGES_S", 0.3)
    async with running_feed(topics, tmp_path, scripted) as (feed, target), stub(target) as client:
        scripted.gate.clear()
        call = client.Generate(Request(prompt="x"))
        assert (await read(call)).text == "The "
        drained = asyncio.create_task(feed.drain(10.0))
        await until(feed._draining.is_set, "it drains")
        code, _, _ = await refusal(client.Generate(Request(prompt="late")))
        assert code is grpc.StatusCode.UNAVAILABLE
        await asyncio.wait([drained], timeout=0.6)
        assert not drained.done()
        scripted.gate.set()
        assert (await asyncio.wait_for(_whole(call), TIMEOUT_S)).HasField("end")
        await drained


async def test_a_text_that_takes_too_long_leaves_time_to_whoever_is_drained_next(
    topics: Topics, tmp_path: Path, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("central.feed.LAST_MESSAGES_S", 0.1)
    async with running_feed(topics, tmp_path, scripted) as (feed, target), stub(target) as client:
        scripted.gate.clear()
        call = client.Generate(Request(prompt="x"))
        assert (await read(call)).text == "The "
        # As `serve` does it: what is not done by then is cancelled in its midst.
        async with asyncio.timeout(2.0):
            await feed.drain(2.0)
        assert feed._ended.is_set()
        code, _, _ = await refusal(call)
        assert code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
