"""Fixtures of central's tests."""

import pytest

from tests.brokers.base import KafkaBroker
from tests.brokers.fixtures import kafka_broker, own_kafka_broker  # noqa: F401
from tests.central.feed_support import Topics


@pytest.fixture
def topics(kafka_broker: KafkaBroker) -> Topics:  # noqa: F811
    """Fresh topics of two partitions each."""
    return Topics(kafka_broker)
