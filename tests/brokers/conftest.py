"""The fixtures under test here."""

from tests.brokers.fixtures import (  # noqa: F401
    kafka_behind_proxy,
    kafka_broker,
    mqtt_broker,
    mqtt_proxy,
    own_kafka_broker,
)
