"""Writing to Kafka, as Sluice does it: `write` returns when the message is acknowledged.

Invariants:
  * `KafkaWriter.write` returns if and only if all in-sync replicas have the message. Expiry, a broker that is away and
    a full queue are waited out inside; a fenced, failed or stuck producer is replaced by a new one. The same message
    may then be in the log twice: no correctness rests on the producer, readers de-duplicate by identity.
  * What waits is bounded by `queue_bytes_max` and by the callers, each of which waits for its own message.

Traps that this module keeps away from its users (each was measured):
  * librdkafka's defaults: idempotence off, and an outage of five minutes loses what waits.
  * a fatal error is not given to the error callback: it is raised from `poll`, in the middle of the delivery reports,
    which are lost then. So the messages of a failed producer are counted as unknown and written again.

`confluent_kafka` is imported when a writer is made, not with this module.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from sluice.backoff import Backoff
from sluice.connections import KafkaConfig
from sluice.errors import Permanent, Retryable
from sluice.kafka_client import (
    AWAY,
    MIB,
    WRITER_PROMISES,
    TopicsConfig,
    base_settings,
    client_logger,
    consumer_settings,
    ensure_topics,
    user_options,
)
from sluice.kafka_producer import OneProducer, Outcome
from sluice.telemetry import Event, Telemetry

__all__ = ["KafkaWriter", "TopicsConfig", "client_logger", "consumer_settings", "ensure_topics"]

REACHABLE = Event(name="kafka_reachable", unit="brokers", help="Times that Kafka came within reach.")
RETRIED = Event(
    name="kafka_write_retried",
    unit="messages",
    help="Messages that were handed to the producer again.",
    labels=("reason",),
    level="warning",
)
REPLACED = Event(
    name="kafka_producer_replaced", unit="producers", help="Producers replaced after a fatal error.", level="error"
)
UNFLUSHED = Event(
    name="kafka_unflushed", unit="messages", help="Messages unacknowledged when a writer closed.", level="error"
)


class KafkaWriter:
    """An idempotent producer whose `write` tells the truth. Also a `Service`: list it last, so that it is closed last.

    Make it and use it on one event loop.

    Args:
        config: how to reach Kafka.
        telemetry: for events.
        client_id: for the brokers' logs and quotas.
        topics: `run` creates the topics of `config` with this before the first write goes out; None: they exist.
        queue_bytes_max: unacknowledged bytes that the client library holds; more wait outside.
        queue_messages_max: the same in messages.
        delivery_timeout_s: after this an unacknowledged message is handed to the producer again.
        message_bytes_max: larger ones are refused (`Permanent`).
        linger_ms: how long a message waits for others to share a request.
    """

    def __init__(
        self,
        config: KafkaConfig,
        telemetry: Telemetry,
        *,
        client_id: str,
        topics: TopicsConfig | None = None,
        queue_bytes_max: int = 64 * MIB,
        queue_messages_max: int = 10_000,
        delivery_timeout_s: float = 30.0,
        message_bytes_max: int = 4 * MIB,
        linger_ms: float = 2.0,
    ) -> None:
        self.name = f"kafka-writer-{client_id}"
        self._config = config
        self._telemetry = telemetry
        self._topics = topics
        self._settings: dict[str, Any] = {
            **base_settings(config, client_id),
            "queue.buffering.max.kbytes": max(1, queue_bytes_max // 1024),
            "queue.buffering.max.messages": queue_messages_max,
            "message.timeout.ms": int(delivery_timeout_s * 1000),
            "message.max.bytes": message_bytes_max,
            "linger.ms": linger_ms,
            **user_options(config, WRITER_PROMISES),
        }
        self._reachable: bool | None = None  # None: nothing is known yet
        self._room = asyncio.Event()
        self._started = asyncio.Event()
        self._closing = asyncio.Event()
        if topics is None:
            self._started.set()
        self._producer = self._new_producer()

    @property
    def reachable(self) -> bool:
        """Whether a broker answered last; thread-safe."""
        return self._reachable is True

    async def run(self) -> None:
        """Creates missing topics, then lets writes through until the writer is closed."""
        if self._topics is not None:
            creating = asyncio.create_task(ensure_topics(self._config, self._telemetry, self._topics))
            closing = asyncio.create_task(self._closing.wait())
            try:
                await asyncio.wait({creating, closing}, return_when=asyncio.FIRST_COMPLETED)
                if creating.done():
                    creating.result()
                    self._started.set()
            finally:
                creating.cancel()
                closing.cancel()
        await self._closing.wait()

    async def drain(self, deadline_s: float) -> None:
        """As `close`."""
        await self.close(deadline_s)

    async def write(
        self,
        topic: str,
        key: str | bytes | None,
        value: bytes,
        headers: Mapping[str, str | bytes] | None = None,
        *,
        on_queued: Callable[[], None] | None = None,
    ) -> tuple[int, int]:
        """Returns if and only if Kafka has the message.

        Args:
            topic: where to.
            key: decides the partition; None spreads.
            value: the message.
            headers: its headers.
            on_queued: called once, when the message has its place in the producer's queue: messages that are queued
                one after the other arrive in that order, unless one has to be handed over again.

        Returns:
            Partition and offset.

        Raises:
            Permanent: Kafka will never take this message: too large, no such topic.
            Retryable: the writer was closed first.
        """
        backoff = Backoff(0.05, 5.0)
        await self._until(self._started)
        while True:
            producer = self._producer
            report = await self._queued(producer, topic, key, value, headers)
            if on_queued is not None:
                on_queued()
                on_queued = None
            outcome = await report
            if outcome.error is None:
                return outcome.partition, outcome.offset
            if outcome.verdict == "permanent":
                raise Permanent(f"Kafka refuses a message of {len(value)} bytes to {topic}: {outcome.error}")
            # One that times out although a broker answers will not find out by itself what ails it.
            if outcome.verdict == "fatal" or (outcome.verdict == "timeout" and self.reachable):
                self._replace(producer, outcome.error)
            self._telemetry.emit(RETRIED, reason=outcome.error, topic=topic)
            await self._pause(backoff.next_s())

    async def close(self, deadline_s: float) -> int:
        """Waits for outstanding messages, then ends. A second call does nothing.

        Returns:
            How many messages were still unacknowledged at the deadline; their writes raise `Retryable`.
        """
        if self._closing.is_set():
            return 0
        self._closing.set()
        left = await self._producer.close(deadline_s)
        if left:
            self._telemetry.emit(UNFLUSHED, count=left, brokers=self._config.bootstrap_servers)
        return left

    def _new_producer(self) -> OneProducer:
        return OneProducer(self._settings, client_logger(self._telemetry), self._set_reachable, self._room.set)

    def _replace(self, failed: OneProducer, why: str) -> None:
        """A new producer for the failed one, unless another writer was quicker."""
        if failed is self._producer and not self._closing.is_set():
            self._telemetry.emit(REPLACED, reason=why)
            self._producer = self._new_producer()
        failed.abandon()

    async def _queued(
        self,
        producer: OneProducer,
        topic: str,
        key: str | bytes | None,
        value: bytes,
        headers: Mapping[str, str | bytes] | None,
    ) -> "asyncio.Future[Outcome]":
        """Hands a message to the producer; waits while its queue is full."""
        while True:
            self._room.clear()
            report = producer.produce(topic, key, value, headers)
            if report is not None:
                return report
            await self._until(self._room)

    async def _until(self, event: asyncio.Event) -> None:
        """Returns when the event is set.

        Raises:
            Retryable: the writer was closed first.
        """
        if not event.is_set():
            waits = [asyncio.create_task(e.wait()) for e in (event, self._closing)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        self._check_open()

    async def _pause(self, delay_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), delay_s)
        self._check_open()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise Retryable(f"the writer to Kafka at {self._config.bootstrap_servers} was closed")

    def _set_reachable(self, reachable: bool, detail: str) -> None:
        """Notes a change; called by the polling thread."""
        if reachable is self._reachable:
            return
        self._reachable = reachable
        brokers = self._config.bootstrap_servers
        if reachable:
            self._telemetry.emit(REACHABLE, brokers=brokers)
        else:
            self._telemetry.emit(AWAY, brokers=brokers, detail=detail)
