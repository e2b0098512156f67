"""The client for asyncio; see `sluice.client.sync`, whose counterpart it is."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc.aio

from protos import feed_pb2, feed_pb2_grpc
from sluice.backoff import Backoff
from sluice.client.analyzing import Ask, Books, Priority
from sluice.client.channel import Tls, credentials, options
from sluice.client.generating import TextEnd, build_request, end_of
from sluice.client.items import Answer, Batch, Item, items_of
from sluice.client.requests import Kind, Progress, StartAt, build_filter, build_start, failure
from sluice.client.sync import RECONNECT_DELAY_S_FIRST, RECONNECT_DELAY_S_MAX, OnWait
from sluice.errors import Retryable


class AsyncFeedClient:
    """One connection to a feed, on one event loop.

    Args:
        target: host:port.
        tls: how to trust the server; None for no TLS.
    """

    def __init__(self, target: str, tls: Tls | None = None) -> None:
        self.target = target
        if tls is None:
            self._channel = grpc.aio.insecure_channel(target, options=options(tls))
        else:
            self._channel = grpc.aio.secure_channel(target, credentials(tls), options=options(tls))
        self._stub: Any = feed_pb2_grpc.FeedStub(self._channel)  # type: ignore[no-untyped-call]

    def subscribe(
        self,
        *,
        kinds: Sequence[Kind] = (),
        sites: Sequence[str] = (),
        devices: Sequence[str] = (),
        streams: Sequence[str] = (),
        labels: Sequence[str] = (),
        score_min: float = 0.0,
        start: StartAt = "latest",
        resume_token: bytes | None = None,
        outage_s_max: float | None = None,
        on_wait: OnWait | None = None,
    ) -> "AsyncSubscription":
        """See `FeedClient.subscribe`."""
        selection = build_filter(
            kinds=kinds, sites=sites, devices=devices, streams=streams, labels=labels, score_min=score_min
        )
        backoff = Backoff(RECONNECT_DELAY_S_FIRST, RECONNECT_DELAY_S_MAX)
        progress = Progress(selection, build_start(start, resume_token), backoff, outage_s_max)
        return AsyncSubscription(self._stub, progress, on_wait)

    async def analyze(
        self,
        texts: Iterable[str],
        *,
        task: str = "",
        stream: str = "",
        priority: Priority = "online",
        deadline_s: float | None = None,
        embed: bool = False,
        model: str = "",
    ) -> AsyncGenerator[Answer, None]:
        """See `FeedClient.analyze`."""
        books = Books(texts, Ask(task, stream, priority, deadline_s, embed, model))
        outbox: asyncio.Queue[feed_pb2.AnalyzeRequest | None] = asyncio.Queue()
        call = self._stub.Analyze(_drawn(outbox))
        try:
            async for answer in _exchange(books, outbox, call):
                yield answer
        except grpc.RpcError as error:
            raise failure(*_status(error), _trailers(error)) from error
        finally:
            outbox.put_nowait(None)
            call.cancel()

    def generate(
        self,
        prompt: str,
        *,
        images: Sequence[bytes] = (),
        chat: bool = False,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        priority: Priority = "online",
        deadline_s: float | None = None,
    ) -> "AsyncTextStream":
        """See `FeedClient.generate`."""
        request = build_request(
            prompt,
            images=images,
            chat=chat,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop=stop,
            priority=priority,
            deadline_s=deadline_s,
        )
        return AsyncTextStream(self._stub.Generate(request))

    async def close(self) -> None:
        """Ends the connection and what runs over it."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        await self.close()


class AsyncSubscription:
    """Iterate it with `async for`, or its `batches()`."""

    def __init__(self, stub: Any, progress: Progress, on_wait: OnWait | None) -> None:
        self.resume_token: bytes | None = progress.token
        self._stub = stub
        self._progress = progress
        self._on_wait = on_wait
        self._closed = asyncio.Event()
        self._call: Any = None

    async def __aiter__(self) -> AsyncIterator[Item]:
        """See `Subscription.__iter__`."""
        async for batch in self.batches():
            for item in batch.items:
                yield item

    async def batches(self) -> AsyncGenerator[Batch, None]:
        """See `Subscription.batches`."""
        while not self._closed.is_set():
            code, detail = "OK", "the server ended the stream"
            try:
                async for batch in self._one_stream():
                    yield batch
            except grpc.RpcError as error:
                code, detail = _status(error)
            except asyncio.CancelledError:
                # The call's own cancellation, by `close`; anybody else's goes on.
                if not self._closed.is_set():
                    raise
            if self._closed.is_set():
                return
            delay_s = self._progress.disconnected(code, detail, time.monotonic())
            if self._on_wait is not None:
                self._on_wait(f"{detail} ({code})", delay_s)
            await _sleep(self._closed, delay_s)

    def close(self) -> None:
        """Ends the iteration."""
        self._closed.set()
        if self._call is not None:
            self._call.cancel()

    async def _one_stream(self) -> AsyncGenerator[Batch, None]:
        self._call = self._stub.Subscribe(self._progress.request())
        try:
            async for message in self._call:
                if items := items_of(message):
                    yield Batch(items, message.resume_token)
                self._progress.received(message)
                self.resume_token = message.resume_token
        finally:
            self._call.cancel()


class AsyncTextStream:
    """See `TextStream`."""

    def __init__(self, call: Any) -> None:
        self.end: TextEnd | None = None
        self._call = call
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        """See `TextStream.__next__`."""
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                self.end = end_of(message)
                if message.text:
                    return str(message.text)
        except grpc.RpcError as error:
            raise failure(*_status(error), _trailers(error)) from error
        except asyncio.CancelledError:
            # The call's own cancellation, by `close`; anybody else's goes on.
            if self._closed:
                raise Retryable("the text was closed before it was complete") from None
            # gRPC does it only once its request is sent, and the server would go on until its deadline.
            self.close()
            raise
        if self.end is None:
            raise Retryable("the server ended the text before it was complete; try again")
        raise StopAsyncIteration

    def close(self) -> None:
        """Ends it, wherever it is. Idempotent."""
        self._closed = True
        self._call.cancel()


async def _exchange(
    books: Books, outbox: "asyncio.Queue[feed_pb2.AnalyzeRequest | None]", call: Any
) -> AsyncGenerator[Answer, None]:
    loop = asyncio.get_running_loop()
    for answer in books.advance(outbox.put_nowait):
        yield answer
    if books.finished:
        return
    async for response in call:
        again = books.take(response)
        if again is not None:
            request, delay_s = again
            loop.call_later(delay_s, outbox.put_nowait, request)
        for answer in books.advance(outbox.put_nowait):
            yield answer
        if books.finished:
            return
    raise Retryable("the server ended the stream before all texts were answered; try again")


async def _drawn(
    outbox: "asyncio.Queue[feed_pb2.AnalyzeRequest | None]",
) -> AsyncGenerator[feed_pb2.AnalyzeRequest, None]:
    while (request := await outbox.get()) is not None:
        yield request


async def _sleep(unless: asyncio.Event, delay_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(unless.wait(), delay_s)


def _status(error: Any) -> tuple[str, str]:
    return error.code().name, error.details() or ""


def _trailers(error: Any) -> list[tuple[str, str | bytes]]:
    return list(error.trailing_metadata() or ())
