"""Fixtures of the client's tests: a broker, fresh topics."""

from tests.brokers.fixtures import kafka_broker  # noqa: F401
from tests.central.conftest import topics  # noqa: F401
