"""What the tests of feed, analysis and client share: envelopes, a producer, a running feed, a small engine."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from central.config import FeedConfig
from central.feed import Feed
from engine.lane import Priority
from protos import feed_pb2, feed_pb2_grpc
from sluice.codec import Limits, encode
from sluice.connections import KafkaConfig, TelemetryConfig
from sluice.record import Record
from sluice.telemetry import Telemetry
from tests.brokers.base import KafkaBroker
from tests.sluice.examples import SPOOL, batch_of

TIMEOUT_S = 20.0
LIMITS = Limits()
SILENT = TelemetryConfig(log_level="error")


def envelope(first: int, count: int = 1, *, text: str = "line", **fields: object) -> bytes:
    """An envelope of `count` records from sequence `first` on, with texts `text-sequence`."""
    records = [Record(event_time_us=first + i, text=f"{text}-{first + i}") for i in range(count)]
    return encode(batch_of(*records, first=first, **fields)).payload


def results(first: int, labels: Sequence[str], scores: Sequence[float] | None = None, **fields: Any) -> bytes:
    """A batch of results."""
    scores = scores or [0.5] * len(labels)
    defaults = {"device_id": "device-1", "stream": "host", "site": "site-1"}
    rows = [
        feed_pb2.Result(sequence=first + i, label=label, score=score)
        for i, (label, score) in enumerate(zip(labels, scores, strict=True))
    ]
    return feed_pb2.ResultBatch(spool_id=SPOOL, results=rows, **(defaults | fields)).SerializeToString()


@dataclass
class Topics:
    """Fresh topics on a broker."""

    broker: KafkaBroker
    partitions: int = 2
    kafka: KafkaConfig = field(init=False)
    _producer: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.kafka = KafkaConfig(
            bootstrap_servers=self.broker.bootstrap,
            records_topic=self.broker.create_topic(self.partitions, "records"),
            results_topic=self.broker.create_topic(self.partitions, "results"),
            options={"fetch.wait.max.ms": "20", "reconnect.backoff.max.ms": "200"} | self._quick_groups(),
        )

    def _quick_groups(self) -> dict[str, str]:
        """The embedded broker keeps a group's first member waiting for half the session time-out."""
        if self.broker.durable:
            return {}
        return {"session.timeout.ms": "600", "heartbeat.interval.ms": "200"}

    def make(self) -> None:
        """Makes them again, after the broker lost them."""
        from sluice.demo.kafka_broker import create_topics

        names = (self.kafka.records_topic, self.kafka.results_topic)
        create_topics(self.broker.bootstrap, dict.fromkeys(names, self.partitions))

    def records(self, *envelopes: bytes, partition: int = 0) -> None:
        self._produce(self.kafka.records_topic, envelopes, partition)

    def results(self, *batches: bytes, partition: int = 0) -> None:
        self._produce(self.kafka.results_topic, batches, partition)

    def _produce(self, topic: str, values: Sequence[bytes], partition: int) -> None:
        """Returns when Kafka has them; the producer is kept, since its start takes longer than a test should."""
        if self._producer is None:
            from confluent_kafka import Producer

            settings = {"bootstrap.servers": self.broker.bootstrap, "acks": "all", "message.max.bytes": 4 << 20}
            self._producer = Producer(settings | {"linger.ms": 1, "reconnect.backoff.max.ms": 200})
        for value in values:
            self._producer.produce(topic, value, partition=partition)
            self._producer.poll(0)
        assert self._producer.flush(TIMEOUT_S) == 0, "Kafka did not take everything"


@contextlib.asynccontextmanager
async def running_feed(
    topics: Topics, state_dir: Path, engine: Any = None, **settings: Any
) -> AsyncIterator[tuple[Feed, str]]:
    """A feed and its address; drained at the end."""
    config = FeedConfig(**({"port": 0, "heartbeat_s": 0.2} | settings))
    feed = Feed(config, topics.kafka, LIMITS, str(state_dir), Telemetry("central", SILENT), engine)
    task = asyncio.create_task(feed.run())
    try:
        port = await asyncio.wait_for(asyncio.shield(feed.port), TIMEOUT_S)
        yield feed, f"127.0.0.1:{port}"
    finally:
        await feed.drain(2.0)
        await asyncio.wait_for(task, TIMEOUT_S)


@contextlib.asynccontextmanager
async def stub(target: str, **options: int) -> AsyncIterator[feed_pb2_grpc.FeedStub]:
    async with grpc.aio.insecure_channel(target, options=[*options.items(), ("grpc.http2.bdp_probe", 0)]) as channel:
        yield feed_pb2_grpc.FeedStub(channel)


def start(**at: Any) -> feed_pb2.Start:
    return feed_pb2.Start(**at)


class Listener:
    """One subscription, read until enough has come."""

    def __init__(self, client: Any, wanted: feed_pb2.Filter | None = None, **at: Any) -> None:
        self.sequences: list[int] = []
        self.results: list[tuple[int, str]] = []
        self.batches: list[feed_pb2.FeedBatch] = []
        self.token = b""
        self.drained = ""
        self.call = client.Subscribe(feed_pb2.SubscribeRequest(filter=wanted, start=feed_pb2.Start(**at)))

    async def next(self) -> feed_pb2.FeedBatch | None:
        """The next message of any kind; None at the stream's end."""
        batch = await asyncio.wait_for(self.call.read(), TIMEOUT_S)
        if batch is grpc.aio.EOF:
            return None
        self.token = batch.resume_token
        kind = batch.WhichOneof("body")
        if kind == "records":
            self.sequences += [row.sequence for row in batch.records.records]
        elif kind == "results":
            self.results += [(row.sequence, row.label) for row in batch.results.results]
        elif kind == "drain":
            self.drained = batch.drain.reason
        self.batches.append(batch)
        return batch

    async def begun(self) -> "Listener":
        """Returns when the server has said where the subscription begins."""
        assert (await self.next()).WhichOneof("body") == "heartbeat"
        return self

    async def until(self, enough: Callable[["Listener"], bool]) -> "Listener":
        deadline = time.monotonic() + TIMEOUT_S
        while not enough(self):
            assert time.monotonic() < deadline, f"came: {len(self.sequences)} records, {len(self.results)} results"
            assert await self.next() is not None, f"the stream ended: {await self.call.details()}"
        return self

    async def records(self, count: int) -> list[int]:
        return sorted((await self.until(lambda self: len(self.sequences) >= count)).sequences)

    async def end(self) -> grpc.StatusCode:
        """Reads to the end; its status."""
        try:
            while await self.next() is not None:
                pass
        except grpc.aio.AioRpcError as error:
            return error.code()
        return await self.call.code()

    async def refusal(self) -> tuple[grpc.StatusCode, str]:
        code = await self.end()
        return code, await self.call.details()


async def until(holds: Callable[[], bool], what: str) -> None:
    """Waits until `holds()`; fails with `what`."""
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.005)


@dataclass(frozen=True)
class Analysis:
    """As `engine.service.Analysis`."""

    label: str = ""
    score: float = 0.0
    novelty: float = 0.0
    embedding: bytes | None = None
    token_count: int = 0
    truncated: bool = False
    error: str | None = None
    reason: str = ""
    model: str = "small"
    model_version: str = "1"
    spans: tuple[Any, ...] = ()


class SmallEngine:
    """An engine in a few lines: the label is the first word, the score comes from the length.

    `gate` keeps calls waiting while it is cleared; a text that begins with a key of `errors` raises or fails as said.
    """

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.raises: dict[str, Exception] = {}
        self.fails: dict[str, Analysis] = {}
        self.calls: list[tuple[tuple[str, ...], str, Priority]] = []
        self.models: list[str] = []
        self.cancelled = 0
        self.waiting = 0

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
    ) -> list[Analysis]:
        self.calls.append((tuple(texts), task, priority))
        self.models.append(model)
        for text in texts:
            if text in self.raises:
                raise self.raises[text]
        self.waiting += 1
        try:
            async with asyncio.timeout(deadline_s):
                await self.gate.wait()
        except TimeoutError:
            return [Analysis(error="its deadline passed", reason="deadline")] * len(texts)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1
        return [self.fails.get(text) or self._one(text, embed) for text in texts]

    @staticmethod
    def _one(text: str, embed: bool) -> Analysis:
        if text.startswith("bad"):
            return Analysis(error="this text cannot be analysed", reason="text")
        vector = b"\x00\x3c" if embed else None
        label = text.split("-", maxsplit=1)[0]
        return Analysis(label, 0.75, 0.25, vector, len(text))
