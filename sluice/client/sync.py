"""The client for threads."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, Self

import grpc

from protos import feed_pb2, feed_pb2_grpc
from sluice.backoff import Backoff
from sluice.client.analyzing import Ask, Books, Priority
from sluice.client.channel import Tls, credentials, options
from sluice.client.generating import TextEnd, build_request, end_of
from sluice.client.items import Answer, Batch, Item, items_of
from sluice.client.requests import Kind, Progress, StartAt, build_filter, build_start, failure
from sluice.errors import Retryable, SluiceError

RECONNECT_DELAY_S_FIRST: Final = 0.1
RECONNECT_DELAY_S_MAX: Final = 10.0
OnWait = Callable[[str, float], None]


class FeedClient:
    """One connection to a feed; its methods may be called from several threads.

    Args:
        target: host:port.
        tls: how to trust the server; None for no TLS.
    """

    def __init__(self, target: str, tls: Tls | None = None) -> None:
        self.target = target
        if tls is None:
            self._channel = grpc.insecure_channel(target, options=options(tls))
        else:
            self._channel = grpc.secure_channel(target, credentials(tls), options=options(tls))
        self._stub = feed_pb2_grpc.FeedStub(self._channel)  # type: ignore[no-untyped-call]

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
    ) -> "Subscription":
        """A stream of items that resumes by itself.

        Args:
            kinds: `records`, `results`; empty for both.
            sites: globs; empty for all. So are `devices`, `streams` and, for results, `labels`.
            devices: see `sites`.
            streams: see `sites`.
            labels: see `sites`.
            score_min: of results.
            start: `latest`, `earliest`, an aware datetime, or UTC microseconds.
            resume_token: continue behind the batch that carried it; `start` does not count then.
            outage_s_max: give up after so long without a connection; None for never.
            on_wait: told the reason and the delay in seconds before each new attempt.

        Raises:
            Permanent: the filter or the start makes no sense.
        """
        selection = build_filter(
            kinds=kinds, sites=sites, devices=devices, streams=streams, labels=labels, score_min=score_min
        )
        backoff = Backoff(RECONNECT_DELAY_S_FIRST, RECONNECT_DELAY_S_MAX)
        progress = Progress(selection, build_start(start, resume_token), backoff, outage_s_max)
        return Subscription(self._stub, progress, on_wait)

    def analyze(
        self,
        texts: Iterable[str],
        *,
        task: str = "",
        stream: str = "",
        priority: Priority = "online",
        deadline_s: float | None = None,
        embed: bool = False,
        model: str = "",
    ) -> Iterator[Answer]:
        """Online inference: one answer per text, in order, while texts are still being read.

        Args:
            texts: any number.
            task: `classify` (default), `embed`, `novelty` or `tokens`, as far as the server's models offer it.
            stream: whose texts they are; novelty is kept per stream.
            priority: `online` goes first.
            deadline_s: per text; None for the server's default.
            embed: whether answers carry the embedding.
            model: the name of one of the server's models; empty: the one that offers the task.

        Raises:
            Permanent: the server has no engine.
            Backpressure: the server has no room for another stream.
            Retryable: the server is away.
        """
        books = Books(texts, Ask(task, stream, priority, deadline_s, embed, model))
        outbox: queue.SimpleQueue[feed_pb2.AnalyzeRequest | None] = queue.SimpleQueue()
        call = self._stub.Analyze(iter(outbox.get, None))
        try:
            yield from _exchange(books, outbox, call)
        except grpc.RpcError as error:
            raise _translated(error) from error
        finally:
            outbox.put(None)
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
    ) -> "TextStream":
        """Continues a prompt with the server's generative model: pieces of text as they are made.

        Args:
            prompt: any text; with `chat` or images what a user says, for models with a chat template.
            images: PNG, JPEG, WebP, BMP or GIF files, for image-text models.
            chat: put the prompt into the model's chat template.
            max_new_tokens: None for the server's default.
            temperature: 0 for the most likely token each time.
            stop: texts in front of which the answer ends.
            priority: `online` goes first.
            deadline_s: until the whole text must be there; None for the server's default.

        Raises:
            Permanent: it cannot be sent. What the server says comes with the pieces: see `TextStream`.
        """
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
        return TextStream(self._stub.Generate(request))

    def close(self) -> None:
        """Ends the connection and what runs over it."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


class Subscription:
    """Iterate it, or its `batches()`; in one thread. `close` may be called from another."""

    def __init__(self, stub: Any, progress: Progress, on_wait: OnWait | None) -> None:
        self.resume_token: bytes | None = progress.token
        self._stub = stub
        self._progress = progress
        self._on_wait = on_wait
        self._closed = threading.Event()
        self._call: Any = None

    def __iter__(self) -> Iterator[Item]:
        """All items. `resume_token` moves when the last item of a batch was taken and the next is asked for."""
        for batch in self.batches():
            yield from batch.items

    def batches(self) -> Iterator[Batch]:
        """All batches, until closed.

        Raises:
            Permanent: the server refuses the subscription.
            Retryable: the outage lasted longer than `outage_s_max`.
        """
        while not self._closed.is_set():
            code, detail = "OK", "the server ended the stream"
            try:
                yield from self._one_stream()
            except grpc.RpcError as error:
                code, detail = error.code().name, error.details() or ""
            if self._closed.is_set():
                return
            delay_s = self._progress.disconnected(code, detail, time.monotonic())
            if self._on_wait is not None:
                self._on_wait(f"{detail} ({code})", delay_s)
            self._closed.wait(delay_s)

    def close(self) -> None:
        """Ends the iteration."""
        self._closed.set()
        if self._call is not None:
            self._call.cancel()

    def _one_stream(self) -> Iterator[Batch]:
        self._call = self._stub.Subscribe(self._progress.request())
        if self._closed.is_set():
            self._call.cancel()
        try:
            for message in self._call:
                if items := items_of(message):
                    yield Batch(items, message.resume_token)
                self._progress.received(message)
                self.resume_token = message.resume_token
        finally:
            self._call.cancel()


class TextStream:
    """The pieces of one text, in one thread; `close` it to stop early, which frees its place at the server.

    Attributes:
        end: how it ended; None before that.
    """

    def __init__(self, call: Any) -> None:
        self.end: TextEnd | None = None
        self._call = call

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        """The next piece.

        Raises:
            Backpressure: the server has no room; nothing was begun.
            Permanent: the server cannot answer this, or has no such model.
            Retryable: the server is away, or the deadline passed.
        """
        try:
            for message in self._call:
                self.end = end_of(message)
                if message.text:
                    return str(message.text)
        except grpc.RpcError as error:
            raise _translated(error) from error
        if self.end is None:
            raise Retryable("the server ended the text before it was complete; try again")
        raise StopIteration

    def close(self) -> None:
        """Ends it, wherever it is. Idempotent."""
        self._call.cancel()


def _exchange(
    books: Books, outbox: "queue.SimpleQueue[feed_pb2.AnalyzeRequest | None]", call: Iterable[Any]
) -> Iterator[Answer]:
    yield from books.advance(outbox.put)
    if books.finished:
        return
    for response in call:
        again = books.take(response)
        if again is not None:
            request, delay_s = again
            timer = threading.Timer(delay_s, outbox.put, (request,))
            timer.daemon = True
            timer.start()
        yield from books.advance(outbox.put)
        if books.finished:
            return
    raise Retryable("the server ended the stream before all texts were answered; try again")


def _translated(error: grpc.RpcError) -> SluiceError:
    trailers = [(each.key, each.value) for each in error.trailing_metadata() or ()]
    return failure(error.code().name, error.details() or "", trailers)
