"""Reading Kafka as a log: manual assignment, explicit offsets, no consumer group. Blocking; one thread per reader.

Traps that this module keeps away from its users (each was measured):
  * Some brokers answer ListOffsets(latest) too low; the high watermark in *fetch* responses is right. `bounds`
    therefore fetches once at the listed end and takes the watermark from that answer.
  * Reading beyond the end (a re-created topic, a wiped broker) is an error on Apache Kafka and silence on others:
    `read` compares its position with the watermark of the last fetch.

Fails: `Retryable` when the broker does not answer; `OffsetGone` when a position is no longer (or not yet) in the log.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from central.feed_batches import Entry
from central.tokens import Partition
from protos import feed_pb2
from sluice.connections import KafkaConfig
from sluice.errors import Permanent, Retryable
from sluice.kafka_client import consumer_settings

if TYPE_CHECKING:
    from confluent_kafka import Message

PROBE_FETCH_WAIT_MS: Final = 10


class Bounds(NamedTuple):
    """The offsets that a partition holds: `[low, high)`."""

    low: int
    high: int


class OffsetGone(Permanent):
    """A position is outside of what Kafka holds."""

    def __init__(self, partition: Partition, offset: int, bounds: Bounds | None = None) -> None:
        topic, number = partition
        held = f", which holds [{bounds.low}, {bounds.high})" if bounds else ""
        why = "was deleted by retention" if bounds and offset < bounds.low else "is not in the log (was it re-created?)"
        super().__init__(f"offset {offset} of {topic}/{number} {why}{held}")
        self.partition = partition


class LogReader:
    """Reads partitions from given offsets on.

    Args:
        kafka: how to reach it.
        queue_bytes_max: what librdkafka may fetch ahead.
        on_error: told of errors that librdkafka gets over by itself (a broker that is away).
        fetch_wait_ms: how long the broker may hold a fetch back when there is nothing new; None: as configured.
    """

    def __init__(
        self,
        kafka: KafkaConfig,
        *,
        queue_bytes_max: int,
        on_error: Callable[[str], None],
        fetch_wait_ms: int | None = None,
    ) -> None:
        from confluent_kafka import Consumer

        self._kind_of = {kafka.records_topic: feed_pb2.KIND_RECORDS, kafka.results_topic: feed_pb2.KIND_RESULTS}
        self._on_error = on_error
        self._next: dict[Partition, int] = {}
        # The client insists on a group; it is never joined, and nothing is committed.
        settings = consumer_settings(
            kafka,
            "sluice-feed-unused",
            client_id="sluice-feed",
            partition_eof=True,
            offset_reset="error",
            queue_bytes_max=queue_bytes_max,
            partition_bytes_max=min(1 << 20, queue_bytes_max),
        )
        if fetch_wait_ms is not None:
            settings["fetch.wait.max.ms"] = fetch_wait_ms
        settings["error_cb"] = lambda error: on_error(error.str())
        settings["log_level"] = 0  # what matters comes through error_cb
        self._consumer = Consumer(settings)

    def partitions(self, topics: Iterable[str], timeout_s: float = 2.0) -> list[Partition]:
        """All partitions of the topics.

        Raises:
            Retryable: when the broker does not answer, or does not know a topic (yet).
        """
        found: list[Partition] = []
        for topic in topics:
            metadata = self._metadata(topic, timeout_s)
            if metadata.error is not None or not metadata.partitions:
                raise Retryable(f"Kafka: topic {topic}: {metadata.error or 'it has no partitions yet'}")
            found.extend((topic, number) for number in sorted(metadata.partitions))
        return found

    def bounds(self, partitions: Iterable[Partition], timeout_s: float = 10.0) -> dict[Partition, Bounds]:
        """What each partition holds, exactly, at a moment between call and return. Replaces the assignment."""
        deadline = time.monotonic() + timeout_s
        listed = {partition: self._listed(partition, timeout_s) for partition in partitions}
        self.assign({partition: bounds.high for partition, bounds in listed.items()})
        exact: dict[Partition, Bounds] = {}
        while len(exact) < len(listed):
            if time.monotonic() > deadline:
                raise Retryable(f"Kafka: no fetch was answered within {timeout_s:g} s")
            for answer in self._poll(64, 0.1):
                partition = _partition(answer)
                if self._is_failure(answer) or partition not in listed:
                    continue
                exact.setdefault(partition, Bounds(listed[partition].low, self._watermark(partition)))
        self.assign({})
        return exact

    def offsets_at(
        self, partitions: Iterable[Partition], time_us: int, timeout_s: float = 10.0
    ) -> dict[Partition, int]:
        """For each partition an offset at or below its first entry that was appended at `time_us` or later.

        A partition without such an entry is left out.
        """
        from confluent_kafka import TopicPartition

        wanted = [TopicPartition(topic, number, time_us // 1000) for topic, number in partitions]
        found = self._ask(lambda: self._consumer.offsets_for_times(wanted, timeout=timeout_s))
        return {(at.topic, at.partition): at.offset for at in found if at.offset >= 0}

    def assign(self, positions: Mapping[Partition, int]) -> None:
        """Reads these partitions from these offsets on, and no others."""
        from confluent_kafka import TopicPartition

        self._next = dict(positions)
        self._ask(lambda: self._consumer.assign([TopicPartition(t, p, offset) for (t, p), offset in positions.items()]))

    def read(self, entries_max: int, timeout_s: float) -> list[Entry]:
        """The next entries, at most `entries_max`; those of one partition in order. Empty when there are none in time.

        Raises:
            OffsetGone: when a partition's position is outside of the log.
        """
        answers = self._poll(entries_max, timeout_s)
        entries = [self._entry(answer) for answer in answers if not self._is_failure(answer) and answer.error() is None]
        for entry in entries:
            self._next[entry.partition] = entry.offset + 1
        if not entries:
            self._check_watermarks()
        return entries

    def close(self) -> None:
        """Ends the connection."""
        self._consumer.close()

    def _metadata(self, topic: str, timeout_s: float) -> Any:
        return self._ask(lambda: self._consumer.list_topics(topic, timeout=timeout_s)).topics[topic]

    def _poll(self, answers_max: int, timeout_s: float) -> "list[Message]":
        """Waits for one answer and takes what else is there; `consume` alone would wait until it has them all."""
        first = self._consumer.poll(timeout_s)
        if first is None:
            return []
        return [first, *self._consumer.consume(answers_max - 1, 0)] if answers_max > 1 else [first]

    def _listed(self, partition: Partition, timeout_s: float) -> Bounds:
        from confluent_kafka import TopicPartition

        low, high = self._ask(
            lambda: self._consumer.get_watermark_offsets(TopicPartition(*partition), timeout=timeout_s, cached=False)
        )
        return Bounds(low, high)

    def _watermark(self, partition: Partition) -> int:
        """The high watermark of the last fetch; negative before the first."""
        from confluent_kafka import TopicPartition

        _, high = self._consumer.get_watermark_offsets(TopicPartition(*partition), cached=True)
        return int(high)

    def _check_watermarks(self) -> None:
        for partition, offset in self._next.items():
            if 0 <= self._watermark(partition) < offset:
                raise OffsetGone(partition, offset)

    def _is_failure(self, answer: "Message") -> bool:
        """Whether the answer is an error; the end of a partition is none.

        Raises:
            OffsetGone: when it says that the position is not in the log.
        """
        from confluent_kafka import KafkaError

        error = answer.error()
        if error is None or error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - the library's public name
            return False
        partition = _partition(answer)
        if error.code() in {KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE}:  # noqa: SLF001 - as above
            raise OffsetGone(partition, self._next.get(partition, -1))
        self._on_error(error.str())
        return True

    def _entry(self, answer: "Message") -> Entry:
        partition, offset = _partition(answer), answer.offset()
        assert offset is not None, "a message has an offset"
        _, time_ms = answer.timestamp()
        return Entry(
            kind=self._kind_of[partition[0]],
            partition=partition,
            offset=offset,
            append_time_us=max(0, time_ms) * 1000,
            value=answer.value() or b"",
        )

    def _ask(self, question: Callable[[], Any]) -> Any:
        from confluent_kafka import KafkaException

        try:
            return question()
        except KafkaException as error:
            raise Retryable(f"Kafka: {error.args[0].str()}") from error


def _partition(answer: "Message") -> Partition:
    """Where an answer belongs; errors that belong nowhere get an impossible partition."""
    topic, number = answer.topic(), answer.partition()
    return topic or "", -1 if number is None else number
