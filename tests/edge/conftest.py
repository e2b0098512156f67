"""Fixtures of the agent's tests."""

from tests.brokers.fixtures import mqtt_broker, mqtt_proxy  # noqa: F401
