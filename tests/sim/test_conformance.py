"""The simulation's broker and log behave, when nothing fails, as the embedded and the real ones do.

One suite, run on all of them: what a history assumes of MQTT and Kafka is what is tested here on the real thing.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import pytest

from tests.brokers.base import KafkaBroker
from tests.brokers.clients import MqttClient, consume, produce
from tests.brokers.embedded import EmbeddedKafka, EmbeddedMqtt
from tests.brokers.kafka import ApacheKafka
from tests.brokers.mosquitto import Mosquitto
from tests.sim.fake_kafka import FakeKafka
from tests.sim.fake_mqtt import FakeMqtt, FakeMqttClient

UP = "sluice/v1/site/device/up"
ALL_UP = "sluice/v1/+/+/up"
STATUS = "sluice/v1/site/device/status"
ALL_STATUS = "sluice/v1/+/+/status"


def _name(broker: object) -> str:
    return str(getattr(broker, "name", broker))


class Client(Protocol):
    """What the suite needs of an MQTT client with manual acknowledgements."""

    session_present: bool | None

    def subscribe(self, topic_filter: str) -> None: ...
    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> str: ...
    def next(self) -> Any: ...
    def acknowledge(self, message: Any) -> bytes: ...
    def take(self, count: int) -> list[bytes]: ...


class Mqtt:
    """A broker under test: clients of it, and its restart without memory."""

    def __init__(self, connect: Callable[[str], AbstractContextManager[Client]], wipe: Callable[[], None]) -> None:
        self.connect = connect
        self.wipe = wipe


@pytest.fixture(params=["fake", EmbeddedMqtt, pytest.param(Mosquitto, marks=pytest.mark.integration)], ids=_name)
def mqtt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mqtt]:
    if request.param == "fake":
        fake = FakeMqtt()
        yield Mqtt(lambda client_id: FakeMqttClient(fake, client_id), fake.forget)
        return
    with request.param(tmp_path_factory.mktemp("mqtt")) as broker:

        def wipe() -> None:
            broker.kill()
            broker.wipe()
            broker.start()

        yield Mqtt(lambda client_id: MqttClient(client_id, broker.port), wipe)


def test_mqtt_messages_arrive_in_order(mqtt: Mqtt) -> None:
    sent = [b"%d" % number for number in range(20)]
    with mqtt.connect("gateway") as gateway, mqtt.connect("device") as device:
        gateway.subscribe(ALL_UP)
        for payload in sent:
            assert device.publish(UP, payload) in {"Success", "No matching subscribers"}
        assert gateway.take(20) == sent


def test_mqtt_delivers_only_what_was_subscribed_to(mqtt: Mqtt) -> None:
    with mqtt.connect("gateway") as gateway, mqtt.connect("device") as device:
        gateway.subscribe(ALL_UP)
        for topic in (STATUS, "sluice/v1/site/device/up/more", "other/v1/site/device/up", UP):
            device.publish(topic, topic.encode())
        assert gateway.take(1) == [UP.encode()]


def test_mqtt_sends_again_what_was_not_acknowledged_and_nothing_else(mqtt: Mqtt) -> None:
    with mqtt.connect("device") as device:
        with mqtt.connect("gateway") as gateway:
            gateway.subscribe(ALL_UP)
            for payload in (b"a", b"b", b"c"):
                device.publish(UP, payload)
            assert gateway.take(1) == [b"a"]
            assert [gateway.next().payload for _ in range(2)] == [b"b", b"c"]
        device.publish(UP, b"while away")
        with mqtt.connect("gateway") as gateway:
            assert gateway.session_present
            assert gateway.take(3) == [b"b", b"c", b"while away"]


def test_mqtt_gives_the_last_retained_message_to_a_new_subscription(mqtt: Mqtt) -> None:
    with mqtt.connect("device") as device, mqtt.connect("gateway") as gateway:
        device.publish(STATUS, b"old", retain=True)
        device.publish(STATUS, b"new", retain=True)
        gateway.subscribe(ALL_STATUS)
        message = gateway.next()
        assert (message.payload, message.retain) == (b"new", True)


def test_mqtt_without_memory_knows_neither_sessions_nor_messages(mqtt: Mqtt) -> None:
    with mqtt.connect("gateway") as gateway:
        gateway.subscribe(ALL_UP)
    with mqtt.connect("device") as device:
        device.publish(UP, b"lost")
    mqtt.wipe()
    with mqtt.connect("gateway") as gateway, mqtt.connect("device") as device:
        assert gateway.session_present is False
        gateway.subscribe(ALL_UP)
        device.publish(UP, b"new")
        assert gateway.take(1) == [b"new"]


class Log:
    """A topic under test: `append` gives (partition, offset), `read` gives (key, value) from an offset to the end."""

    def __init__(
        self,
        append: Callable[[bytes, list[bytes]], list[tuple[int, int]]],
        read: Callable[[int, int], list[tuple[bytes, bytes]]],
    ) -> None:
        self.append = append
        self.read = read


@pytest.fixture(
    scope="module", params=["fake", EmbeddedKafka, pytest.param(ApacheKafka, marks=pytest.mark.integration)], ids=_name
)
def kafka(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker | None]:
    """A broker; None for the fake."""
    if request.param == "fake":
        yield None
        return
    with request.param(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker


@pytest.fixture
def log(kafka: KafkaBroker | None) -> Log:
    """A fresh topic."""
    if kafka is None:
        fake = FakeKafka(partitions=3)
        return Log(
            lambda key, values: [fake.produce(key, value) for value in values],
            lambda partition, offset: [tuple(entry) for entry in fake.read(partition, offset)],
        )
    topic = kafka.create_topic(partitions=3)
    return Log(
        lambda key, values: produce(kafka.bootstrap, topic, values, key=key),
        lambda partition, offset: [
            (message.key(), message.value()) for message in consume(kafka.bootstrap, topic, partition, offset)
        ],
    )


def test_kafka_keeps_the_order_and_the_bytes_of_a_key_at_consecutive_offsets(log: Log) -> None:
    sent = [bytes([number]) * number for number in range(30)]
    places = log.append(b"device-1", sent)
    (partition,) = {partition for partition, _ in places}
    assert [offset for _, offset in places] == list(range(30))
    assert log.read(partition, 0) == [(b"device-1", value) for value in sent]


def test_kafka_keeps_a_key_in_one_partition_for_ever(log: Log) -> None:
    found = {key: {partition for partition, _ in log.append(key, [b"x", b"y"])} for key in (b"d1", b"d2", b"d3", b"d4")}
    assert {len(partitions) for partitions in found.values()} == {1}
    assert len(set.union(*found.values())) > 1
    assert {partition for partition, _ in log.append(b"d1", [b"later"])} == found[b"d1"]


def test_kafka_is_read_from_an_offset_to_the_end_and_again(log: Log) -> None:
    partition, _ = log.append(b"device-1", [b"%d" % number for number in range(10)])[0]
    for _ in range(2):
        assert [value for _, value in log.read(partition, 7)] == [b"7", b"8", b"9"]
    assert log.read(partition, 10) == []
