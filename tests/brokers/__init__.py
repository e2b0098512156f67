"""Real and embedded brokers behind one interface, and a proxy that breaks their connections.

Fixtures are in `tests.brokers.fixtures`; a part's conftest.py imports those that it uses:

    from tests.brokers.fixtures import kafka_broker, mqtt_broker  # noqa: F401
"""
