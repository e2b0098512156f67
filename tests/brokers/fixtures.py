"""Fixtures: each test that asks for a broker runs once with the embedded and once with the real one.

The real ones are marked `integration`. A broker of MQTT starts in a tenth of a second, so each test has its own;
Kafka's are shared by a session (take fresh topics from `create_topic`, and do not stop them): a test that stops, kills
or wipes takes `own_kafka_broker`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from sluice.demo.loopback import free_port
from tests.brokers.base import KafkaBroker, MqttBroker
from tests.brokers.embedded import EmbeddedKafka, EmbeddedMqtt
from tests.brokers.kafka import ApacheKafka
from tests.brokers.mosquitto import Mosquitto
from tests.brokers.proxy import FaultProxy

_MQTT = [EmbeddedMqtt, pytest.param(Mosquitto, marks=pytest.mark.integration)]
_KAFKA = [EmbeddedKafka, pytest.param(ApacheKafka, marks=pytest.mark.integration)]


def _identity(value: object) -> str | None:
    return getattr(value, "name", None)


class KafkaBehindProxy(NamedTuple):
    """A broker whose clients are told to connect through the proxy."""

    broker: KafkaBroker
    proxy: FaultProxy


@pytest.fixture(params=_MQTT, ids=_identity)
def mqtt_broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MqttBroker]:
    with request.param(tmp_path_factory.mktemp("mqtt")) as broker:
        yield broker


@pytest.fixture(scope="session", params=_KAFKA, ids=_identity)
def kafka_broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    with request.param(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker


@pytest.fixture(params=_KAFKA, ids=_identity)
def own_kafka_broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    with request.param(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker


@pytest.fixture
def mqtt_proxy(mqtt_broker: MqttBroker) -> Iterator[FaultProxy]:
    """A fault proxy in front of `mqtt_broker`."""
    with FaultProxy(mqtt_broker.port) as proxy:
        yield proxy


@pytest.fixture(params=_KAFKA, ids=_identity)
def kafka_behind_proxy(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KafkaBehindProxy]:
    port = free_port()
    broker = request.param(tmp_path_factory.mktemp("kafka"), advertised_port=port)
    with FaultProxy(broker.port, listen_port=port) as proxy, broker:
        yield KafkaBehindProxy(broker, proxy)
