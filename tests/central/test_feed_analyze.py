import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from engine.lane import Priority
from engine.spans import Span
from protos import feed_pb2
from sluice.errors import Backpressure, Permanent, Retryable
from tests.central.feed_support import TIMEOUT_S, Analysis, SmallEngine, Topics, running_feed, stub, until

Request = feed_pb2.AnalyzeRequest
Errors = feed_pb2.AnalyzeError


@pytest.fixture
def engine() -> SmallEngine:
    return SmallEngine()


@pytest.fixture
async def client(topics: Topics, tmp_path: Path, engine: SmallEngine) -> AsyncIterator[Any]:
    async with running_feed(topics, tmp_path, engine, analyze_in_flight_max=4) as (_, target), stub(target) as found:
        yield found


async def answer(call: Any) -> feed_pb2.AnalyzeResponse:
    return await asyncio.wait_for(call.read(), TIMEOUT_S)


async def ask(client: Any, *requests: Request) -> dict[str, feed_pb2.AnalyzeResponse]:
    """The answers by request id, when the stream has ended."""
    call = client.Analyze(iter(requests))
    answers = [each async for each in call]
    assert await call.code() is grpc.StatusCode.OK
    return {each.request_id: each for each in answers}


async def test_each_request_gets_its_result_under_its_own_id(client: Any, engine: SmallEngine) -> None:
    answers = await ask(client, *(Request(request_id=f"r{i}", text=f"word{i}-x") for i in range(20)))
    assert {key: value.result.label for key, value in answers.items()} == {f"r{i}": f"word{i}" for i in range(20)}
    one = answers["r1"]
    assert (one.model, one.model_version, one.result.token_count) == ("small", "1", 7)
    assert one.result.embedding == b""


async def test_task_priority_and_embedding_reach_the_engine(client: Any, engine: SmallEngine) -> None:
    background = Request(
        request_id="b", text="two", task="embed", priority=feed_pb2.PRIORITY_BACKGROUND, want_embedding=True
    )
    answers = await ask(client, Request(request_id="a", text="one"), background)
    calls = [(("one",), "classify", Priority.ONLINE), (("two",), "embed", Priority.BACKGROUND)]
    assert sorted(engine.calls) == sorted(calls)
    assert answers["b"].result.embedding == b"\x00\x3c"


async def test_a_response_comes_when_it_is_ready_whatever_the_others_do(client: Any, engine: SmallEngine) -> None:
    call = client.Analyze()
    engine.gate.clear()
    await call.write(Request(request_id="slow", text="slow", deadline_ms=60_000))
    await call.write(Request(request_id="refused", text="x", priority=99))
    assert (await answer(call)).request_id == "refused"
    engine.gate.set()
    assert (await answer(call)).request_id == "slow"
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("raised", "code", "retry_after_ms"),
    [
        (Backpressure("the queue is full", retry_after_s=1.5), Errors.CODE_OVERLOADED, 1500),
        (Retryable("the engine is not started"), Errors.CODE_OVERLOADED, 1000),
        (Permanent("no task 'dance'"), Errors.CODE_INVALID, 0),
        (ZeroDivisionError("a bug"), Errors.CODE_INTERNAL, 0),
    ],
)
async def test_an_engine_that_raises_fails_that_request_alone(
    client: Any, engine: SmallEngine, raised: Exception, code: int, retry_after_ms: int
) -> None:
    engine.raises["one"] = raised
    answers = await ask(client, Request(request_id="1", text="one"), Request(request_id="2", text="two"))
    error = answers["1"].error
    assert (error.code, error.retry_after_ms) == (code, retry_after_ms)
    assert str(raised) in error.message
    assert not answers["1"].HasField("result")
    assert answers["2"].result.label == "two"


async def test_a_text_that_the_engine_refuses_is_invalid(client: Any) -> None:
    answers = await ask(client, Request(request_id="1", text="bad text"), Request(request_id="2" * 300, text="long id"))
    assert answers["1"].error.code == Errors.CODE_INVALID
    assert answers["2" * 256].error.code == Errors.CODE_INVALID


@pytest.mark.parametrize(
    ("reason", "code", "retry_after_ms"),
    [
        ("text", Errors.CODE_INVALID, 0),
        ("model", Errors.CODE_INVALID, 0),
        ("deadline", Errors.CODE_DEADLINE_EXCEEDED, 0),
        ("device", Errors.CODE_INTERNAL, 0),
        ("stopped", Errors.CODE_OVERLOADED, 1000),
    ],
)
async def test_the_code_follows_the_reason_and_not_the_clock(
    client: Any, engine: SmallEngine, reason: Any, code: int, retry_after_ms: int
) -> None:
    engine.fails["one"] = Analysis(error="no result", reason=reason)
    answers = await ask(client, Request(request_id="1", text="one"), Request(request_id="2", text="two"))
    error = answers["1"].error
    assert (error.code, error.message, error.retry_after_ms) == (code, "no result", retry_after_ms)
    assert answers["2"].result.label == "two"


@pytest.mark.parametrize("stream", ["x" * 129, "a b", "../up"])
async def test_a_stream_that_is_no_name_is_refused(client: Any, stream: str) -> None:
    answers = await ask(client, Request(request_id="1", text="t", stream=stream))
    assert answers["1"].error.code == Errors.CODE_INVALID
    assert "stream" in answers["1"].error.message


async def test_a_deadline_that_passes_is_said(client: Any, engine: SmallEngine) -> None:
    engine.gate.clear()
    answers = await ask(client, Request(request_id="1", text="late", deadline_ms=20))
    assert answers["1"].error.code == Errors.CODE_DEADLINE_EXCEEDED


async def test_when_the_client_goes_away_its_work_is_cancelled(client: Any, engine: SmallEngine) -> None:
    engine.gate.clear()
    call = client.Analyze()
    for i in range(3):
        await call.write(Request(request_id=str(i), text="wait", deadline_ms=60_000))
    await until(lambda: engine.waiting == 3, "all three are in the engine")
    call.cancel()
    await until(lambda: engine.cancelled == 3 and engine.waiting == 0, "all three were taken out")


async def test_a_stream_is_not_read_beyond_its_limit(client: Any, engine: SmallEngine) -> None:
    engine.gate.clear()
    call = client.Analyze(iter([Request(request_id=str(i), text="w", deadline_ms=60_000) for i in range(50)]))
    await until(lambda: engine.waiting == 4, "the limit is reached")
    for _ in range(20):
        await asyncio.sleep(0)
    assert engine.waiting == 4
    engine.gate.set()
    assert len([each async for each in call]) == 50


async def test_drain_answers_what_was_begun_and_ends_the_stream_well(
    topics: Topics, tmp_path: Path, engine: SmallEngine
) -> None:
    async with running_feed(topics, tmp_path, engine) as (feed, target), stub(target) as client:
        engine.gate.clear()
        call = client.Analyze()
        await call.write(Request(request_id="1", text="begun", deadline_ms=60_000))
        await until(lambda: engine.waiting == 1, "it is in the engine")
        drained = asyncio.create_task(feed.drain(10.0))
        await asyncio.sleep(0)
        engine.gate.set()
        assert (await answer(call)).result.label == "begun"
        assert await call.code() is grpc.StatusCode.OK
        await drained


async def test_without_an_engine_it_says_so(topics: Topics, tmp_path: Path) -> None:
    async with running_feed(topics, tmp_path) as (_, target), stub(target) as client:
        call = client.Analyze(iter([Request(text="x")]))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_model_asked_for_reaches_the_engine_and_spans_come_back(client: Any, engine: SmallEngine) -> None:
    engine.fails["one"] = Analysis("WORD", 0.5, spans=(Span(0, 3, "WORD", 0.5),))
    answers = await ask(client, Request(request_id="a", text="one", model="ner"), Request(request_id="b", text="two"))
    assert sorted(engine.models) == ["", "ner"]
    found = [(span.start, span.end, span.label, span.score) for span in answers["a"].result.spans]
    assert found == [(0, 3, "WORD", 0.5)]
