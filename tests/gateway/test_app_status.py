"""What devices say of themselves reaches Kafka checked, and only the newest of it."""
# ruff: noqa: F811 - a fixture that is imported has the name of the argument that asks for it

import io
from pathlib import Path
from typing import Any

import pytest

from gateway.path_config import StatusConfig
from gateway.status import StatusRelay, checked, newest
from protos import control_pb2
from sluice import topics
from sluice.connections import MqttConfig
from sluice.errors import Permanent
from sluice.mqtt import Message
from sluice.telemetry import Telemetry
from tests.brokers.base import KafkaBroker, MqttBroker
from tests.brokers.fixtures import kafka_broker, mqtt_broker  # noqa: F401
from tests.gateway.site import SITE, Device, gateway_config, running, until
from tests.sluice.examples import SPOOL

TOPIC = topics.Topic(SITE, "device-1", topics.STATUS)
CANARY = "canary 4111111111111111"


def status(**fields: object) -> control_pb2.Status:
    values = {
        "device_id": "device-1",
        "site": SITE,
        "spool_id": SPOOL,
        "next_sequence": 50,
        "spool_ranges": [control_pb2.SequenceRange(first=10, last=49)],
        "agent_version": "0.1.0",
        "online": True,
        "status_time_us": 5,
    }
    return control_pb2.Status(**(values | fields))


async def test_a_status_reaches_kafka_by_device(
    mqtt_broker: MqttBroker, kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    config = gateway_config(mqtt_broker.port, kafka_broker.bootstrap, tmp_path)
    async with running(config) as gateway, Device(mqtt_broker.port) as device:
        await device.send(b"\xff nonsense " + CANARY.encode(), topics.STATUS)
        await device.send(status(device_id="device-2").SerializeToString(), topics.STATUS)
        await device.send(status(agent_version=CANARY).SerializeToString(), topics.STATUS)
        await until(lambda: gateway.telemetry.registry.get_sample_value("sluice_status_relayed_total"), "relayed")
        (message,) = await gateway.kafka(config.kafka.status_topic)
        assert message.key() == b"device-1"
        told = control_pb2.Status.FromString(message.value())
        assert (told.next_sequence, told.agent_version) == (50, "")
        assert told.received_time_us > 0
        assert gateway.events("status_refused") == 2
        assert CANARY not in gateway.log.getvalue()


async def test_a_topic_that_names_no_device_is_not_quoted() -> None:
    log = io.StringIO()
    writer: Any = None
    relay = StatusRelay(StatusConfig(), MqttConfig(), "c", SITE, writer, "t", Telemetry("gateway", stream=log))
    topic = f"sluice/v1/{SITE}/{CANARY}/status"
    relay._receive(Message(topic, status().SerializeToString(), False, 1, 1, 0))  # the session's callback
    assert "status_refused" in log.getvalue()
    assert CANARY not in log.getvalue()


def test_known_fields_pass_and_unknown_ones_do_not() -> None:
    payload = status().SerializeToString() + b"\xfa\x01" + bytes([len(CANARY)]) + CANARY.encode()
    told = checked(payload, TOPIC, StatusConfig(), 7)
    assert told == status(received_time_us=7)
    assert CANARY.encode() not in told.SerializeToString()


@pytest.mark.parametrize(
    "fields",
    [
        {"device_id": "device-2"},
        {"site": "site-2"},
        {"spool_id": b"short"},
        {"next_sequence": 2**63},
        {"next_sequence": 49},
        {"spool_ranges": [control_pb2.SequenceRange(first=3, last=2)]},
        {"spool_ranges": [control_pb2.SequenceRange(first=1, last=1)] * 4},
        {"agent_version": "x" * 300},
    ],
)
def test_a_status_that_breaks_a_rule_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(Permanent):
        checked(status(**fields).SerializeToString(), TOPIC, StatusConfig(ranges_max=3, bytes_max=256), 7)


def test_a_last_will_takes_the_device_offline_but_not_back_in_time() -> None:
    newer, will = status(spool_records=3), status(spool_records=9, online=False)
    assert newest(newer, will) == status(spool_records=3, online=False)
    newer = status(spool_records=3)
    assert newest(will, newer) is newer


def test_the_devices_clock_does_not_decide_which_status_is_newest() -> None:
    ahead, now = status(status_time_us=10**15), status(status_time_us=7, next_sequence=90)
    assert newest(ahead, now) is now


def test_another_spool_of_the_device_speaks_for_itself() -> None:
    old, new = status(), status(spool_id=bytes(16), next_sequence=1, spool_ranges=[])
    assert newest(old, new) is new
