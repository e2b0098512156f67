"""The Kafka side of the lake: one thread that reads, hands to the `LakeWriter`, and flushes.

Invariants:
  * Reading always begins where the tables say, never at Kafka's committed offsets; those are for lag metrics only.
  * Nothing is read while a flush is being retried, so what waits stays bounded; the group membership is kept alive.
  * Messages that were fetched under one assignment are never added under another.

How it fails: Kafka or the lake away: waits, says so, goes on. Offsets that do not fit the lake: `on_offset_regression`.
A lake that cannot be used, or a fatal client error: raises, and the process ends.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from threading import Event
from typing import TYPE_CHECKING, Any, Final, TypeVar

from central.decode import Message
from central.lake import events
from central.lake.commit import Fenced
from central.lake.config import LakeConfig
from central.lake.writer import LakeWriter
from sluice.backoff import Backoff
from sluice.errors import Permanent, Retryable
from sluice.telemetry import Telemetry

if TYPE_CHECKING:
    from confluent_kafka import Consumer

T = TypeVar("T")
Place = tuple[str, int]
POLL_S: Final = 0.1
WATCH_INTERVAL_S: Final = 1.0
_QUERY_TIMEOUT_S: Final = 5.0


class Stopped(Exception):
    """The loop was asked to end while it was waiting."""


class LakeConsumer:
    """Reads topics into a lake until it is stopped.

    Args:
        settings: of the consumer, from `sluice.kafka_client.consumer_settings` with `offset_reset="error"`.
        topics: to subscribe to.
        writer: where messages go.
        config: limits.
        telemetry: for events and gauges.
        logger: for the client library's own lines.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        topics: Sequence[str],
        writer: LakeWriter,
        config: LakeConfig,
        telemetry: Telemetry,
        logger: Any = None,
    ) -> None:
        self._settings = dict(settings)
        self._topics = list(topics)
        self._writer = writer
        self._config = config
        self._telemetry = telemetry
        self._logger = logger
        self._stop = Event()
        self._deadline_s = float("inf")
        self._generation = 0
        self._standing = False
        self._next: dict[Place, int] = {}
        self._quiet_since_s: dict[Place, float] = {}
        self._watched_s = 0.0
        self._lag = telemetry.gauge("lake_lag_messages", "Messages in Kafka not yet read.", ("topic", "partition"))
        self._waiting = telemetry.gauge("lake_pending_bytes", "Decoded bytes that wait for the next commit.")
        #: Whether partitions are assigned and the last flush, if any, went well.
        self.ready = False

    def stop(self, deadline_s: float) -> None:
        """Asks the loop to flush and end within `deadline_s` seconds. May be called from any thread, and twice."""
        self._deadline_s = min(self._deadline_s, time.monotonic() + deadline_s)
        self._stop.set()

    def run(self) -> None:
        """Works until stopped. The calling thread is busy until then."""
        from confluent_kafka import Consumer

        try:
            self._insist(self._writer.prepare)
        except Stopped:
            return
        consumer = Consumer(self._settings, logger=self._logger)
        consumer.subscribe(self._topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)
        try:
            while not self._stop.is_set():
                self._step(consumer)
            self._flush(consumer, "drain")
        except Stopped:
            self._writer.drop()
        finally:
            self.ready = False
            consumer.close()

    def _step(self, consumer: "Consumer") -> None:
        chunk = self._collect(consumer)
        if chunk:
            self._take(consumer, chunk)
        reason = self._writer.pending.due(time.monotonic())
        if reason:
            self._flush(consumer, reason)
        self._watch(consumer)

    # --- reading ----------------------------------------------------------------------------------------------------

    def _collect(self, consumer: "Consumer") -> list[Message]:
        """Messages of one assignment, at most a chunk."""
        chunk: list[Message] = []
        size_bytes = 0
        generation = self._generation
        while len(chunk) < self._config.chunk_messages_max and size_bytes < self._config.chunk_bytes_max:
            message = consumer.poll(0 if chunk else POLL_S)
            if generation != self._generation:
                # What came before the rebalance will come again, from where the table says.
                chunk, size_bytes, generation = [], 0, self._generation
            if message is None:
                break
            if message.error():
                self._on_error(consumer, message)
                # It may have moved our partitions: what came before comes again then, and added now it would pass for
                # all that lies between.
                return chunk if generation == self._generation else []
            converted = self._convert(message)
            if converted is not None:
                chunk.append(converted)
                size_bytes += len(converted.value)
        return chunk

    def _convert(self, message: Any) -> Message | None:
        """The message in our terms; None when it was read before."""
        place: Place = (message.topic(), message.partition())
        offset = message.offset()
        if offset < self._next.get(place, 0):
            return None
        self._next[place] = offset + 1
        self._quiet_since_s[place] = time.monotonic()
        kind, timestamp_ms = message.timestamp()
        headers = message.headers() or []
        return Message(
            app=self._writer.app(*place),
            topic=place[0],
            partition=place[1],
            offset=offset,
            value=message.value() or b"",
            timestamp_us=timestamp_ms * 1000 if kind else 0,
            headers={name: value for name, value in headers if value is not None},
        )

    def _take(self, consumer: "Consumer", chunk: Sequence[Message]) -> None:
        try:
            self._writer.add(chunk, time.monotonic())
        except Retryable as error:
            self._telemetry.emit(events.COMMIT_FAILED, detail=str(error))
            self._reassign(consumer)
        self._waiting.set(self._writer.pending.bytes)

    # --- flushing ---------------------------------------------------------------------------------------------------

    def _flush(self, consumer: "Consumer", reason: str) -> None:
        """Returns when what waited is committed, or dropped because it has another owner."""
        backoff = Backoff(min(0.2, self._config.commit_retry_s_max), self._config.commit_retry_s_max)
        try:
            while True:
                try:
                    flushed = self._writer.flush(reason)
                    break
                except Fenced as error:
                    self._telemetry.emit(events.FENCED, detail=str(error))
                    self._reassign(consumer)
                    return
                except Retryable as error:
                    delay_s = backoff.next_s()
                    self.ready = False
                    self._telemetry.emit(events.COMMIT_FAILED, detail=str(error), retry_s=round(delay_s, 2))
                    self._stand_still(consumer, delay_s)
        finally:
            self._move_on(consumer)
        self.ready = bool(self._next)
        self._waiting.set(0)
        self._publish_offsets(consumer, flushed.stops)

    def _stand_still(self, consumer: "Consumer", delay_s: float) -> None:
        """Waits without reading, but stays in the group.

        Raises:
            Stopped: the deadline of a drain has passed.
        """
        until_s = time.monotonic() + delay_s
        self._standing = True
        consumer.pause(consumer.assignment())
        # A drain may set the deadline meanwhile.
        while (left_s := min(until_s, self._deadline_s) - time.monotonic()) > 0:
            message = consumer.poll(min(left_s, POLL_S))
            if message is None:
                continue
            if message.error():
                # It is said once: unheard, its partition would stand still for ever.
                self._on_error(consumer, message)
                continue
            # Only after a rebalance just now: rare, and never to be lost.
            converted = self._convert(message)
            if converted is not None:
                self._take(consumer, [converted])
        if time.monotonic() >= self._deadline_s:
            raise Stopped

    def _move_on(self, consumer: "Consumer") -> None:
        if self._standing:
            self._standing = False
            consumer.resume(consumer.assignment())

    def _publish_offsets(self, consumer: "Consumer", stops: Mapping[str, int]) -> None:
        """Tells Kafka how far we are; nothing rests on it, so a failure is no matter."""
        from confluent_kafka import KafkaException, TopicPartition

        offsets = []
        for app, stop in stops.items():
            topic, _, partition = app.split("/", 1)[1].rpartition("/")
            offsets.append(TopicPartition(topic, int(partition), stop))
        if not offsets:
            return
        try:
            consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            self._telemetry.emit(events.KAFKA_ERROR, code=error.args[0].name(), detail=str(error))

    # --- assignment -------------------------------------------------------------------------------------------------

    def _on_assign(self, consumer: "Consumer", partitions: list[Any]) -> None:
        self._begin(consumer, [(p.topic, p.partition) for p in partitions])
        self._telemetry.emit(events.ASSIGNED, len(partitions), starts=self._starts_text())
        self.ready = True

    def _on_revoke(self, _consumer: "Consumer", partitions: list[Any]) -> None:
        self._generation += 1
        try:
            self._writer.flush("revoked")
        except (Retryable, Fenced) as error:
            self._telemetry.emit(events.FENCED, detail=str(error))
            self._writer.drop()
        self._forget(partitions)

    def _on_lost(self, _consumer: "Consumer", partitions: list[Any]) -> None:
        """Others own them already: what waits is theirs."""
        self._generation += 1
        self._writer.drop()
        self._forget(partitions)

    def _forget(self, partitions: Sequence[Any]) -> None:
        self.ready = False
        self._next.clear()
        self._quiet_since_s.clear()
        for partition in partitions:
            self._lag.labels(partition.topic, partition.partition).set(0)
        self._telemetry.emit(events.REVOKED, len(partitions))

    def _reassign(self, consumer: "Consumer") -> None:
        """The same partitions, from where the tables say."""
        self._begin(consumer, [(p.topic, p.partition) for p in consumer.assignment()])

    def _begin(self, consumer: "Consumer", places: Sequence[Place]) -> None:
        from confluent_kafka import OFFSET_BEGINNING, TopicPartition

        self._generation += 1
        starts = self._insist(lambda: self._writer.assign(places))
        now_s = time.monotonic()
        self._next = {place: start or 0 for place, start in starts.items()}
        self._quiet_since_s = dict.fromkeys(places, now_s)
        positions = [
            TopicPartition(*place, OFFSET_BEGINNING if start is None else start) for place, start in starts.items()
        ]
        consumer.assign(positions)
        if self._standing:
            consumer.pause(positions)

    def _starts_text(self) -> str:
        return ", ".join(f"{topic}[{partition}]@{at}" for (topic, partition), at in sorted(self._next.items()))

    def _insist(self, action: Callable[[], T]) -> T:
        """Tries until it works.

        Raises:
            Stopped: asked to end meanwhile.
        """
        backoff = Backoff(min(0.2, self._config.commit_retry_s_max), self._config.commit_retry_s_max)
        while True:
            try:
                return action()
            except Retryable as error:
                delay_s = backoff.next_s()
                self._telemetry.emit(events.COMMIT_FAILED, detail=str(error), retry_s=round(delay_s, 2))
                if self._stop.wait(delay_s):
                    raise Stopped from error

    # --- watching ---------------------------------------------------------------------------------------------------

    def _on_error(self, consumer: "Consumer", message: Any) -> None:
        from confluent_kafka import KafkaError

        error = message.error()
        if error.code() == KafkaError._AUTO_OFFSET_RESET:  # noqa: SLF001 - how the library names it
            self._regressed(consumer, (message.topic(), message.partition()))
            return
        self._telemetry.emit(events.KAFKA_ERROR, code=error.name(), detail=error.str())
        if error.fatal():
            raise Retryable(f"Kafka client: {error.str()}")

    def _watch(self, consumer: "Consumer") -> None:
        """Lag, from the high watermark that fetches bring; and partitions that are shorter than the lake says."""
        from confluent_kafka import TopicPartition

        now_s = time.monotonic()
        if now_s - self._watched_s < WATCH_INTERVAL_S:
            return
        self._watched_s = now_s
        for place, position in list(self._next.items()):
            ends = consumer.get_watermark_offsets(TopicPartition(*place), cached=True)
            if not ends or ends[1] < 0:
                continue
            self._lag.labels(*place).set(max(0, ends[1] - position))
            quiet_s = now_s - self._quiet_since_s[place]
            if ends[1] < position and quiet_s > self._config.regression_grace_s:
                self._regressed(consumer, place)
                return

    def _regressed(self, consumer: "Consumer", place: Place) -> None:
        """Kafka does not have the offset that comes next.

        Raises:
            Permanent: when the configuration says `stop`.
        """
        from confluent_kafka import KafkaException, TopicPartition

        position = self._next.get(place, 0)
        try:
            low, high = consumer.get_watermark_offsets(TopicPartition(*place), timeout=_QUERY_TIMEOUT_S, cached=False)
        except (KafkaException, TypeError) as error:
            self._telemetry.emit(events.KAFKA_ERROR, code="watermarks", detail=str(error))
            return
        if low <= position <= high:
            self._quiet_since_s[place] = time.monotonic()
            return
        name = f"{place[0]}[{place[1]}]"
        if position < low:
            what = (
                f"{name}: Kafka begins at {low}, the lake has read up to {position}: {low - position} messages are gone"
            )
        else:
            what = f"{name}: Kafka ends at {high}, the lake has read up to {position}: the topic was made anew"
        self._telemetry.emit(events.OFFSETS_REGRESSED, topic=place[0], partition=place[1], detail=what)
        if self._config.on_offset_regression == "stop":
            raise Permanent(
                f'{what}. Set lake.on_offset_regression = "reset" to begin at {low} (records that are in the lake are '
                "refused as duplicates), or lake.cluster to a new name"
            )
        self._insist(lambda: self._writer.restart_at(*place, low))
        self._reassign(consumer)
