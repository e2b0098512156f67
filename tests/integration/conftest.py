"""Both pairs of brokers: embedded, and Mosquitto with Apache Kafka."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.brokers.base import KafkaBroker, MqttBroker
from tests.brokers.embedded import EmbeddedKafka, EmbeddedMqtt
from tests.brokers.kafka import ApacheKafka
from tests.brokers.mosquitto import Mosquitto


class Brokers(NamedTuple):
    """A pair that runs."""

    mqtt: MqttBroker
    kafka: KafkaBroker


@pytest.fixture(params=[(EmbeddedMqtt, EmbeddedKafka), (Mosquitto, ApacheKafka)], ids=["embedded", "real"])
def brokers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Brokers]:
    mqtt_kind, kafka_kind = request.param
    with mqtt_kind(tmp_path_factory.mktemp("mqtt")) as mqtt, kafka_kind(tmp_path_factory.mktemp("kafka")) as kafka:
        yield Brokers(mqtt, kafka)


@pytest.fixture
def real_brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Brokers]:
    with Mosquitto(tmp_path_factory.mktemp("mqtt")) as mqtt, ApacheKafka(tmp_path_factory.mktemp("kafka")) as kafka:
        yield Brokers(mqtt, kafka)
