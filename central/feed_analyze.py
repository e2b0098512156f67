"""`Feed.Analyze`: online inference over one bidirectional stream.

Each request is worked on by itself and answered when it is ready, whatever the others do. At most
`feed.analyze_in_flight_max` are under way per stream; beyond that the stream is not read, so that HTTP/2's flow control
slows the client. When the client goes away its requests are cancelled, which takes them out of the engine's queue.

Fails: an invalid request, an expired deadline or an overloaded engine is an `AnalyzeError` of that request alone.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from central.config import FeedConfig
from engine.lane import Priority
from protos import feed_pb2
from sluice.errors import Backpressure, Permanent, Retryable
from sluice.record import NAME_PATTERN
from sluice.telemetry import Event, Telemetry

if TYPE_CHECKING:
    from engine.service import Analysis

ANALYZE_FAILED = Event(
    name="feed_analyze_failed",
    unit="requests",
    help="Requests answered with an error.",
    labels=("code",),
    level="debug",
)
REQUEST_ID_CHARS_MAX: Final = 256
PRIORITY: Final = {
    feed_pb2.PRIORITY_ONLINE: Priority.ONLINE,
    feed_pb2.PRIORITY_BACKGROUND: Priority.BACKGROUND,
}
# What went wrong with one text (`Analysis.reason`); anything else is internal.
_CODE: Final = {
    "text": feed_pb2.AnalyzeError.CODE_INVALID,
    "model": feed_pb2.AnalyzeError.CODE_INVALID,
    "deadline": feed_pb2.AnalyzeError.CODE_DEADLINE_EXCEEDED,
    "stopped": feed_pb2.AnalyzeError.CODE_OVERLOADED,
}
# An engine that is starting, stopping or being replaced may be back by then.
_RETRY_S: Final = 1.0
Respond = Callable[[feed_pb2.AnalyzeResponse], Awaitable[None]]


class Analyzer(Protocol):
    """What is needed of the engine."""

    async def analyze(
        self,
        texts: Sequence[str],
        *,
        task: str = "classify",
        stream: str = "",
        priority: Priority = Priority.BACKGROUND,
        deadline_s: float | None = None,
        embed: bool = False,
        model: str = "",
    ) -> "list[Analysis]":
        """One analysis per text, in order. See `engine.service.Engine.analyze`."""
        ...


class Refused(Exception):
    """A request that gets an error instead of a result."""

    def __init__(self, code: "feed_pb2.AnalyzeError.Code", text: str, retry_after_s: float = 0.0) -> None:
        super().__init__(text)
        self.error = feed_pb2.AnalyzeError(code=code, message=text, retry_after_ms=int(retry_after_s * 1000))


class AnalyzeStream:
    """One stream of requests.

    Args:
        engine: does the work.
        config: limits.
        telemetry: for its events.
        respond: sends a response; called by one task at a time.
    """

    def __init__(self, engine: Analyzer, config: FeedConfig, telemetry: Telemetry, respond: Respond) -> None:
        self._engine = engine
        self._config = config
        self._telemetry = telemetry
        self._respond = respond
        self._writing = asyncio.Lock()

    async def serve(self, requests: AsyncIterator[feed_pb2.AnalyzeRequest], draining: asyncio.Event) -> None:
        """Answers all requests; returns when the client has sent its last, or when `draining` is set, after answering.

        What is under way is cancelled when this is.
        """
        permits = asyncio.Semaphore(self._config.analyze_in_flight_max)
        drained = asyncio.create_task(draining.wait())
        try:
            async with asyncio.TaskGroup() as group:
                while not draining.is_set():
                    await permits.acquire()
                    reading = asyncio.ensure_future(anext(requests, None))
                    await _first(reading, drained)
                    request = reading.result() if reading.done() else None
                    if request is None:
                        reading.cancel()
                        break
                    group.create_task(self._serve_one(request)).add_done_callback(lambda _: permits.release())
        finally:
            drained.cancel()

    async def _serve_one(self, request: feed_pb2.AnalyzeRequest) -> None:
        try:
            response = await self._result(request)
        except Refused as refused:
            code = feed_pb2.AnalyzeError.Code.Name(refused.error.code)
            self._telemetry.emit(ANALYZE_FAILED, code=code.removeprefix("CODE_").lower())
            request_id = request.request_id[:REQUEST_ID_CHARS_MAX]
            response = feed_pb2.AnalyzeResponse(request_id=request_id, error=refused.error)
        async with self._writing:
            await self._respond(response)

    async def _result(self, request: feed_pb2.AnalyzeRequest) -> feed_pb2.AnalyzeResponse:
        errors = feed_pb2.AnalyzeError
        if len(request.request_id) > REQUEST_ID_CHARS_MAX:
            raise Refused(errors.CODE_INVALID, f"request_id is longer than {REQUEST_ID_CHARS_MAX} characters")
        priority = PRIORITY.get(request.priority)
        if priority is None:
            raise Refused(errors.CODE_INVALID, f"unknown priority {request.priority}")
        # The engine remembers streams by name: nothing but a name may be one.
        if request.stream and not NAME_PATTERN.match(request.stream):
            raise Refused(errors.CODE_INVALID, "stream: not a valid name (1 to 128 of A-Z a-z 0-9 . _ -)")
        deadline_s = (request.deadline_ms or self._config.analyze_deadline_ms) / 1000
        try:
            (analysis,) = await self._engine.analyze(
                [request.text],
                task=request.task or "classify",
                stream=request.stream,
                priority=priority,
                deadline_s=deadline_s,
                embed=request.want_embedding,
                model=request.model,
            )
        except Backpressure as full:
            raise Refused(errors.CODE_OVERLOADED, str(full), full.retry_after_s) from full
        except Permanent as error:
            raise Refused(errors.CODE_INVALID, str(error)) from error
        except Retryable as error:
            raise Refused(errors.CODE_OVERLOADED, str(error), _RETRY_S) from error
        except Exception as error:
            raise Refused(errors.CODE_INTERNAL, repr(error)) from error
        if analysis.error is not None:
            code = _CODE.get(analysis.reason, errors.CODE_INTERNAL)
            raise Refused(code, analysis.error, _RETRY_S if code == errors.CODE_OVERLOADED else 0.0)
        return feed_pb2.AnalyzeResponse(
            request_id=request.request_id,
            result=to_result(analysis),
            model=analysis.model,
            model_version=analysis.model_version,
        )


def to_result(analysis: "Analysis", sequence: int = 0, event_time_us: int = 0) -> feed_pb2.Result:
    """The analysis of one record on the wire."""
    return feed_pb2.Result(
        sequence=sequence,
        event_time_us=event_time_us,
        label=analysis.label,
        score=analysis.score,
        novelty=analysis.novelty,
        embedding=analysis.embedding or b"",
        token_count=analysis.token_count,
        truncated=analysis.truncated,
        spans=[feed_pb2.Span(start=s.start, end=s.end, label=s.label, score=s.score) for s in analysis.spans],
    )


async def _first(*waits: "asyncio.Future[object] | asyncio.Task[object]") -> None:
    """Returns when one of them is done; when cancelled, cancels the first."""
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        waits[0].cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await waits[0]
        raise
