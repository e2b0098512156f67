"""`Feed.Generate`: a prompt in, its text out, piece by piece.

The request has a place with the generator from its first moment to its last; whatever ends the call (the client
cancels or goes away, its gRPC deadline passes, it takes nothing) ends the request there, too.

Fails: with a SluiceError that `feed_status` turns into the call's status. Text that came before it is part of the
answer, not all of it.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Final, Protocol

from central.config import FeedConfig
from central.feed_analyze import PRIORITY
from central.feed_status import Internal, NotOffered
from protos import feed_pb2
from sluice.errors import Permanent, SluiceError
from sluice.telemetry import Event

if TYPE_CHECKING:
    from engine.generation import Generator

GENERATE_FAILED: Final = Event(
    name="feed_generate_failed",
    unit="requests",
    help="Requests for text that ended with an error.",
    labels=("code",),
    level="debug",
)
_FINISH: Final = {
    "end": feed_pb2.GenerateEnd.FINISH_END,
    "length": feed_pb2.GenerateEnd.FINISH_LENGTH,
    "stop": feed_pb2.GenerateEnd.FINISH_STOP,
}


class Generating(Protocol):
    """What is needed of the engine."""

    @property
    def generator(self) -> "Generator":
        """Generates text now. See `engine.service.Engine.generator`."""
        ...


async def generated(
    engine: Generating, request: feed_pb2.GenerateRequest, config: FeedConfig
) -> AsyncGenerator[feed_pb2.GenerateResponse, None]:
    """The messages that answer a request. Closing it, or cancelling who waits for it, frees the request's place.

    Raises:
        NotOffered: the engine has no model that generates text.
        Permanent: the request can never be answered.
        Backpressure: too many requests.
        DeadlinePassed: the text was not complete in time.
        Retryable: the engine or its device is away.
        Internal: anything else.
    """
    priority = PRIORITY.get(request.priority)
    if priority is None:
        raise Permanent(f"unknown priority {request.priority}")
    try:
        generator = engine.generator
    except Permanent as error:
        raise NotOffered(str(error)) from error
    answer = generator.generate(
        request.prompt,
        images=request.images,
        chat=request.chat,
        max_new_tokens=request.max_new_tokens or None,
        temperature=request.temperature,
        stop=request.stop,
        priority=priority,
        deadline_s=(request.deadline_ms or config.generate_deadline_ms) / 1000,
    )
    try:
        async with aclosing(answer):
            async for piece in answer:
                yield feed_pb2.GenerateResponse(text=piece)
    except SluiceError:
        raise
    except Exception as error:
        raise Internal(repr(error)) from error
    end = feed_pb2.GenerateEnd(
        finish=_FINISH.get(answer.usage.finish, feed_pb2.GenerateEnd.FINISH_UNSPECIFIED),
        prompt_tokens=answer.usage.prompt_tokens,
        new_tokens=answer.usage.new_tokens,
        model=generator.model,
        model_version=generator.model_version,
    )
    yield feed_pb2.GenerateResponse(end=end)
