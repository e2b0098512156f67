"""What the Kafka writer promises, against real brokers and a proxy that breaks them."""
# ruff: noqa: F811 - a fixture that is imported has the name of the argument that asks for it

import asyncio
import io
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from confluent_kafka import Message

from sluice.connections import KafkaConfig, TelemetryConfig
from sluice.errors import ConfigError, Permanent, Retryable
from sluice.kafka import KafkaWriter, TopicsConfig, consumer_settings, ensure_topics
from sluice.telemetry import Telemetry
from tests.brokers.base import KafkaBroker
from tests.brokers.clients import consume
from tests.brokers.fixtures import (  # noqa: F401
    KafkaBehindProxy,
    kafka_behind_proxy,
    kafka_broker,
    own_kafka_broker,
)

WAIT_S = 20.0


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def telemetry(log: io.StringIO) -> Telemetry:
    return Telemetry("test", TelemetryConfig(log_level="debug"), log)


@asynccontextmanager
async def writing(bootstrap: str, telemetry: Telemetry, **settings: object) -> AsyncIterator[KafkaWriter]:
    writer = KafkaWriter(KafkaConfig(bootstrap_servers=bootstrap), telemetry, client_id="test", **settings)
    running = asyncio.create_task(writer.run())
    try:
        yield writer
    finally:
        await writer.close(0.1)
        await asyncio.wait_for(running, WAIT_S)


async def until(check: Callable[[], bool], what: str) -> None:
    """Returns when `check` holds; `what` says in a traceback what was waited for."""
    async with asyncio.timeout(WAIT_S):
        while not check():  # noqa: ASYNC110 - what is waited for is the state of another process
            await asyncio.sleep(0.01)


async def test_write_returns_the_place_where_the_message_is(kafka_broker: KafkaBroker, telemetry: Telemetry) -> None:
    topic = kafka_broker.create_topic(3)
    async with writing(kafka_broker.bootstrap, telemetry) as writer:
        places = await asyncio.gather(
            *(writer.write(topic, f"k{i}", f"v{i}".encode(), {"site": "s", "raw": b"\x00"}) for i in range(30))
        )
    found = {(m.partition(), m.offset()): m for m in read_topic(kafka_broker.bootstrap, topic)}
    for i, place in enumerate(places):
        assert found[place].value() == f"v{i}".encode()
        assert found[place].key() == f"k{i}".encode()
        assert found[place].headers() == [("site", b"s"), ("raw", b"\x00")]
    assert len(found) == 30


async def test_messages_of_a_key_arrive_in_the_order_in_which_they_were_queued(
    kafka_broker: KafkaBroker, telemetry: Telemetry
) -> None:
    topic = kafka_broker.create_topic(2)
    queued: list[int] = []
    async with writing(kafka_broker.bootstrap, telemetry) as writer:
        writes = []
        for i in range(100):
            ready = asyncio.Event()

            def note(i: int = i, ready: asyncio.Event = ready) -> None:
                queued.append(i)
                ready.set()

            writes.append(asyncio.create_task(writer.write(topic, "k", b"%d" % i, on_queued=note)))
            await ready.wait()
        await asyncio.gather(*writes)
    arrived = [int(m.value()) for m in read_topic(kafka_broker.bootstrap, topic)]
    assert queued == arrived == list(range(100))


async def test_a_full_queue_slows_writers_down_and_loses_nothing(
    kafka_broker: KafkaBroker, telemetry: Telemetry
) -> None:
    topic = kafka_broker.create_topic(1)
    async with writing(kafka_broker.bootstrap, telemetry, queue_messages_max=5) as writer:
        await asyncio.gather(*(writer.write(topic, None, b"%d" % i) for i in range(200)))
    assert sorted(int(m.value()) for m in read_topic(kafka_broker.bootstrap, topic)) == list(range(200))


async def test_a_write_begun_while_kafka_is_away_ends_when_it_is_back(
    kafka_behind_proxy: KafkaBehindProxy, telemetry: Telemetry, log: io.StringIO
) -> None:
    broker, proxy = kafka_behind_proxy
    topic = broker.create_topic(1)
    proxy.refuse()
    async with writing(broker.bootstrap, telemetry, delivery_timeout_s=0.5) as writer:
        write = asyncio.create_task(writer.write(topic, "k", b"v"))
        await until(lambda: "kafka_write_retried" in log.getvalue(), "the first expiry")
        assert not write.done()
        await until(lambda: "kafka_away" in log.getvalue(), "it says so")
        assert not writer.reachable
        proxy.heal()
        await asyncio.wait_for(write, WAIT_S)
        # An error of before may be told only now; then it asks the broker itself.
        await until(lambda: writer.reachable, "it says that it is back")
    assert [m.value() for m in read_topic(broker.bootstrap, topic)] == [b"v"]


async def test_a_connection_that_hangs_delays_writes_and_loses_none(
    kafka_behind_proxy: KafkaBehindProxy, telemetry: Telemetry, log: io.StringIO
) -> None:
    broker, proxy = kafka_behind_proxy
    topic = broker.create_topic(1)
    async with writing(broker.bootstrap, telemetry, delivery_timeout_s=1.0) as writer:
        await writer.write(topic, "k", b"0")
        proxy.hang()
        writes = [asyncio.create_task(writer.write(topic, "k", b"%d" % i)) for i in range(1, 20)]
        await until(lambda: "kafka_write_retried" in log.getvalue(), "an expiry")
        proxy.heal()
        await asyncio.wait_for(asyncio.gather(*writes), WAIT_S)
    assert {int(m.value()) for m in read_topic(broker.bootstrap, topic)} == set(range(20))


async def test_a_producer_that_failed_for_good_is_replaced(
    own_kafka_broker: KafkaBroker, telemetry: Telemetry, log: io.StringIO
) -> None:
    """A broker that lost its memory does not know our producer id any more: fatal for an idempotent producer."""
    config = KafkaConfig(bootstrap_servers=own_kafka_broker.bootstrap)
    topics = TopicsConfig(partitions=1, replication_factor=1)
    async with writing(config.bootstrap_servers, telemetry, topics=topics, delivery_timeout_s=2.0) as writer:
        for i in range(3):
            await writer.write(config.records_topic, "k", b"%d" % i)
        own_kafka_broker.kill()
        own_kafka_broker.wipe()
        own_kafka_broker.start()
        await ensure_topics(config, telemetry, topics)
        again = [writer.write(config.records_topic, "k", b"%d" % i) for i in range(3, 6)]
        await asyncio.wait_for(asyncio.gather(*again), WAIT_S)
    values = {int(m.value()) for m in read_topic(own_kafka_broker.bootstrap, config.records_topic)}
    assert values == {3, 4, 5}
    if own_kafka_broker.name == "embedded":
        assert "kafka_producer_replaced" in log.getvalue()


async def test_too_large_a_message_is_refused_for_good(kafka_broker: KafkaBroker, telemetry: Telemetry) -> None:
    topic = kafka_broker.create_topic(1)
    async with writing(kafka_broker.bootstrap, telemetry, message_bytes_max=10_000) as writer:
        with pytest.raises(Permanent, match="10001 bytes"):
            await writer.write(topic, "k", b"x" * 10_001)
        await writer.write(topic, "k", b"x" * 9_000)


async def test_closing_waits_for_what_is_on_its_way(kafka_broker: KafkaBroker, telemetry: Telemetry) -> None:
    topic = kafka_broker.create_topic(1)
    async with writing(kafka_broker.bootstrap, telemetry, linger_ms=300) as writer:
        writes = [asyncio.create_task(writer.write(topic, "k", b"v")) for _ in range(10)]
        await asyncio.sleep(0)
        assert await writer.close(WAIT_S) == 0
        assert await writer.close(WAIT_S) == 0
        assert {partition for partition, _ in await asyncio.gather(*writes)} == {0}
        with pytest.raises(Retryable):
            await writer.write(topic, "k", b"late")


async def test_closing_while_kafka_is_away_says_what_is_left(
    kafka_behind_proxy: KafkaBehindProxy, telemetry: Telemetry, log: io.StringIO
) -> None:
    broker, proxy = kafka_behind_proxy
    topic = broker.create_topic(1)
    proxy.refuse()
    async with writing(broker.bootstrap, telemetry, queue_messages_max=2) as writer:
        writes = [asyncio.create_task(writer.write(topic, "k", b"v")) for _ in range(5)]
        await asyncio.sleep(0)
        assert await writer.close(0.2) == 2
        for outcome in await asyncio.gather(*writes, return_exceptions=True):
            assert isinstance(outcome, Retryable)
    assert "kafka_unflushed" in log.getvalue()


async def test_a_writer_without_kafka_closes_before_it_ever_ran(telemetry: Telemetry) -> None:
    async with writing("127.0.0.1:1", telemetry, topics=TopicsConfig()) as writer:
        write = asyncio.create_task(writer.write("t", "k", b"v"))
        await asyncio.sleep(0)
        assert await writer.close(0.1) == 0
        with pytest.raises(Retryable):
            await write


async def test_topics_are_created_once_and_before_the_first_write(
    kafka_behind_proxy: KafkaBehindProxy, telemetry: Telemetry, log: io.StringIO
) -> None:
    broker, proxy = kafka_behind_proxy
    names = {f"{kind}_topic": f"{kind}.{uuid.uuid4().hex}" for kind in ("records", "results", "quarantine", "status")}
    config = KafkaConfig(bootstrap_servers=broker.bootstrap, **names)
    proxy.refuse()
    writer = KafkaWriter(config, telemetry, client_id="test", topics=TopicsConfig(partitions=3, replication_factor=1))
    running = asyncio.create_task(writer.run())
    write = asyncio.create_task(writer.write(config.records_topic, "k", b"v"))
    await until(lambda: "kafka_away" in log.getvalue(), "the first failure")
    proxy.heal()
    await asyncio.wait_for(write, WAIT_S)
    await writer.close(WAIT_S)
    await running
    for name in names.values():
        assert partition_count(broker.bootstrap, name) == 3
    before = log.getvalue().count('"kafka_topic_created"')
    await ensure_topics(config, telemetry, TopicsConfig(partitions=7, replication_factor=1))
    assert log.getvalue().count('"kafka_topic_created"') == before == 4
    assert partition_count(broker.bootstrap, config.records_topic) == 3


async def test_a_writer_notices_that_kafka_goes_and_comes(
    kafka_behind_proxy: KafkaBehindProxy, telemetry: Telemetry
) -> None:
    broker, proxy = kafka_behind_proxy
    async with writing(broker.bootstrap, telemetry) as writer:
        await until(lambda: writer.reachable, "reachable at first")
        proxy.refuse()
        await until(lambda: not writer.reachable, "noticed that it went")
        proxy.heal()
        await until(lambda: writer.reachable, "noticed that it came")


@pytest.mark.parametrize(("name", "value"), [("acks", "1"), ("enable.idempotence", "false")])
async def test_options_cannot_break_the_writers_promises(telemetry: Telemetry, name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        KafkaWriter(KafkaConfig(options={name: value}), telemetry, client_id="test")


def test_a_consumer_commits_nothing_by_itself() -> None:
    settings = consumer_settings(KafkaConfig(options={"fetch.wait.max.ms": "10"}), "lake", client_id="c")
    assert settings["enable.auto.commit"] is False
    assert settings["group.id"] == "lake"
    assert settings["fetch.wait.max.ms"] == "10"
    with pytest.raises(ConfigError, match=r"enable\.auto\.commit"):
        consumer_settings(KafkaConfig(options={"enable.auto.commit": "true"}), "lake", client_id="c")


def partition_count(bootstrap: str, topic: str) -> int:
    from confluent_kafka.admin import AdminClient

    return len(
        AdminClient({"bootstrap.servers": bootstrap}).list_topics(topic, timeout=WAIT_S).topics[topic].partitions
    )


def read_topic(bootstrap: str, topic: str) -> list[Message]:
    return [m for partition in range(partition_count(bootstrap, topic)) for m in consume(bootstrap, topic, partition)]
