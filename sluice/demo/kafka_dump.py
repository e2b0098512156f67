"""Reads every message of every topic, as bytes: for the search, and for nobody else.

Reads by assignment from offset 0, without a group, until each partition says that it ends.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple

from sluice.demo.kafka_broker import CLIENT_OPTIONS
from sluice.errors import Retryable


class Blob(NamedTuple):
    """Some bytes and where they were: `topic/partition@offset key`."""

    place: str
    data: bytes


def dump(bootstrap: str, deadline_s: float = 120.0) -> Iterator[Blob]:
    """Keys, values, header names and header values of all messages.

    Args:
        bootstrap: of the broker.
        deadline_s: for all of it.

    Raises:
        Retryable: the broker does not answer, or it took longer.
    """
    from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

    settings = {**CLIENT_OPTIONS, "bootstrap.servers": bootstrap, "group.id": "sluice-demo-search"}
    settings |= {"enable.partition.eof": "true", "enable.auto.commit": "false", "auto.offset.reset": "earliest"}
    settings |= {"isolation.level": "read_uncommitted", "log_level": "0"}
    give_up_s = time.monotonic() + deadline_s
    consumer = Consumer(settings)
    try:
        topics = consumer.list_topics(timeout=10.0).topics
        open_partitions = {(name, number) for name, topic in topics.items() for number in topic.partitions}
        consumer.assign([TopicPartition(name, number, 0) for name, number in sorted(open_partitions)])
        while open_partitions:
            if time.monotonic() > give_up_s:
                raise Retryable(f"Kafka at {bootstrap}: {len(open_partitions)} partitions not read in {deadline_s:g} s")
            for message in consumer.consume(500, timeout=0.2):
                error = message.error()
                if error is None:
                    yield from _blobs(message)
                elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - the library's public name for it
                    open_partitions.discard((message.topic(), message.partition()))
                else:
                    raise Retryable(f"Kafka at {bootstrap}: {error.str()}")
    except KafkaException as error:
        raise Retryable(f"Kafka at {bootstrap}: {error}") from error
    finally:
        consumer.close()


def _blobs(message: object) -> Iterator[Blob]:
    place = f"{message.topic()}/{message.partition()}@{message.offset()}"  # type: ignore[attr-defined]
    parts = {"key": message.key(), "value": message.value()}  # type: ignore[attr-defined]
    for name, value in message.headers() or ():  # type: ignore[attr-defined]
        yield Blob(f"{place} header name", name.encode())
        parts[f"header {name}"] = value
    for name, part in parts.items():
        if part:
            yield Blob(f"{place} {name}", part)
