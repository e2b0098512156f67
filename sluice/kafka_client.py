"""Settings of Kafka clients, and the topics that Sluice needs.

Traps that this module keeps away from its users (each was measured):
  * librdkafka writes to stderr, holds up to 1 GiB in its queues, refuses messages above 1 MB and commits by itself;
  * a broker creates an unknown topic with its own default of partitions: topics are created before the first write;
  * with the default session time-out a group on some brokers waits 20 s for its first assignment.

`confluent_kafka` is imported when an admin call is made, not with this module.
"""

import asyncio
import logging
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from msgspec import Meta

from sluice.backoff import Backoff
from sluice.config import Section
from sluice.connections import KafkaConfig
from sluice.errors import ConfigError, Permanent, Retryable
from sluice.telemetry import Event, Telemetry

MIB: Final = 1024 * 1024
AWAY = Event(name="kafka_away", unit="brokers", help="Times that Kafka went out of reach.", level="warning")
TOPIC_CREATED = Event(name="kafka_topic_created", unit="topics", help="Topics that this process created.")
CLIENT_LOG = Event(
    name="kafka_client_log", unit="lines", help="Log lines of the client library.", labels=("severity",), level="debug"
)

# What our promises rest on; `kafka.options` cannot change them.
WRITER_PROMISES: Final[Mapping[str, Any]] = {"enable.idempotence": True, "acks": "all"}
READER_PROMISES: Final[Mapping[str, Any]] = {"enable.auto.commit": False, "enable.auto.offset.store": False}


class TopicsConfig(Section, frozen=True, kw_only=True):
    """How missing topics are created. Existing ones are left as they are."""

    partitions: Annotated[int, Meta(ge=1, le=10_000, description="Partitions of a topic that we create.")] = 4
    replication_factor: Annotated[
        int, Meta(ge=-1, le=100, description="Replicas of a topic that we create; -1: the cluster's default.")
    ] = -1
    message_bytes_max: Annotated[
        int, Meta(ge=1024, description="Largest message of a topic that we create, and that we write.")
    ] = 4 * MIB


async def ensure_topics(
    config: KafkaConfig, telemetry: Telemetry, topics: TopicsConfig, *, timeout_s: float = 2.0
) -> None:
    """Creates those of the configuration's four topics that are missing; waits while Kafka is away, and says so.

    Args:
        config: how to reach Kafka, and the names.
        telemetry: for events.
        topics: what to create.
        timeout_s: for one attempt.

    Raises:
        Permanent: Kafka refuses to create a topic, and a retry would not help.
    """
    backoff = Backoff(0.25, 5.0)
    names = (config.records_topic, config.results_topic, config.quarantine_topic, config.status_topic)
    while True:
        try:
            created = await asyncio.to_thread(_create_missing, config, names, topics, timeout_s)
        except Retryable as error:
            delay_s = backoff.next_s()
            telemetry.emit(AWAY, brokers=config.bootstrap_servers, detail=str(error), retry_s=round(delay_s, 2))
            await asyncio.sleep(delay_s)
            continue
        for name in created:
            telemetry.emit(TOPIC_CREATED, topic=name, partitions=topics.partitions)
        return


def consumer_settings(
    config: KafkaConfig,
    group: str,
    *,
    client_id: str,
    partition_eof: bool = False,
    offset_reset: Literal["earliest", "latest", "error"] = "earliest",
    queue_bytes_max: int = 64 * MIB,
    partition_bytes_max: int = 4 * MIB,
) -> dict[str, Any]:
    """Settings of a consumer that commits nothing by itself and holds a bounded queue.

    Args:
        config: how to reach Kafka.
        group: consumer group; also needed by one that assigns its partitions itself.
        client_id: for the brokers' logs and quotas.
        partition_eof: whether `_PARTITION_EOF` is delivered at a partition's end.
        offset_reset: where to begin when there is no offset, or the offset is gone.
        queue_bytes_max: fetched and not yet consumed.
        partition_bytes_max: fetched at once from one partition.
    """
    return {
        **base_settings(config, client_id),
        "group.id": group,
        "auto.offset.reset": offset_reset,
        "enable.partition.eof": partition_eof,
        # A member that dies is noticed after 6 s; some brokers also make the first member wait half of it.
        "session.timeout.ms": 6000,
        "heartbeat.interval.ms": 2000,
        # Brokers that do not wake a waiting fetch answer after this (Tansu: half of it).
        "fetch.wait.max.ms": 50,
        "queued.max.messages.kbytes": max(1, queue_bytes_max // 1024),
        "max.partition.fetch.bytes": partition_bytes_max,
        **user_options(config, READER_PROMISES),
    }


def client_logger(telemetry: Telemetry) -> logging.Logger:
    """A logger for `Producer(..., logger=)` and `Consumer(..., logger=)`: the library's lines become debug events."""
    logger = logging.Logger("librdkafka")  # noqa: LOG001 - not in the global tree, so that each process part owns its own
    logger.addHandler(_Forward(telemetry))
    return logger


class _Forward(logging.Handler):
    """Log records as telemetry."""

    def __init__(self, telemetry: Telemetry) -> None:
        super().__init__()
        self._telemetry = telemetry

    def emit(self, record: logging.LogRecord) -> None:
        self._telemetry.emit(CLIENT_LOG, severity=record.levelname.lower(), detail=record.getMessage())


def base_settings(config: KafkaConfig, client_id: str) -> dict[str, Any]:
    """What all clients share."""
    return {
        "bootstrap.servers": config.bootstrap_servers,
        "client.id": client_id,
        "reconnect.backoff.max.ms": 2000,
        # Known brokers that are gone must not be waited for longer than new ones take to be learnt.
        "socket.connection.setup.timeout.ms": 5000,
    }


def user_options(config: KafkaConfig, promises: Mapping[str, Any]) -> dict[str, Any]:
    """The user's settings and, above them, those that our promises rest on.

    Raises:
        ConfigError: naming the option that would break a promise.
    """
    for name, value in promises.items():
        given = config.options.get(name)
        if given is not None and given.lower() != str(value).lower():
            raise ConfigError(f"kafka.options: {name} must be {str(value).lower()}: Sluice's promises rest on it")
    return {**config.options, **promises}


def _create_missing(
    config: KafkaConfig, names: tuple[str, ...], topics: TopicsConfig, timeout_s: float
) -> tuple[str, ...]:
    from confluent_kafka import KafkaError, KafkaException
    from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

    # log_level 0: nobody polls an admin client's log queue, and stderr is not for it.
    admin = AdminClient({**base_settings(config, "sluice-admin"), **config.options, "log_level": 0})
    try:
        existing = admin.list_topics(timeout=timeout_s).topics
        missing = [
            NewTopic(
                name,
                topics.partitions,
                topics.replication_factor,
                config={"max.message.bytes": str(topics.message_bytes_max)},
            )
            for name in dict.fromkeys(names)
            if name not in existing
        ]
        created = []
        for name, future in admin.create_topics(missing, request_timeout=timeout_s).items() if missing else ():
            try:
                future.result(timeout_s)
                created.append(name)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise
    except KafkaException as error:
        cause = error.args[0]
        detail = f"Kafka at {config.bootstrap_servers}: {cause.str()}"
        hopeless = {KafkaError.INVALID_PARTITIONS, KafkaError.INVALID_REPLICATION_FACTOR, KafkaError.TOPIC_EXCEPTION}
        if cause.code() in hopeless:
            raise Permanent(f"cannot create a topic: {detail}") from error
        raise Retryable(detail) from error
    except TimeoutError as error:
        raise Retryable(f"Kafka at {config.bootstrap_servers}: no answer within {timeout_s} s") from error
    return tuple(created)
