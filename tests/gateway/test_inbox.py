"""What the inbox holds is bounded, whatever the broker sends; and nothing that it puts aside is lost."""
# ruff: noqa: F811 - a fixture that is imported has the name of the argument that asks for it

import asyncio
import gc
import io
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from gateway.batches import Verdict
from gateway.inbox import Inbox
from gateway.path_config import InboxConfig, RoutingConfig, StatusConfig
from gateway.quarantine import Refusal
from gateway.ring import Slot
from gateway.status import StatusRelay
from protos import control_pb2
from sluice.codec import Limits
from sluice.connections import MqttConfig
from sluice.mqtt import Message
from sluice.record import Record, RecordBatch
from sluice.telemetry import Telemetry
from tests.brokers.base import KafkaBroker, MqttBroker
from tests.brokers.clients import MqttClient
from tests.brokers.fixtures import kafka_broker, mqtt_broker, mqtt_proxy  # noqa: F401
from tests.brokers.proxy import FaultProxy
from tests.gateway.site import SITE, Device, by_text, gateway_config, running, until
from tests.sluice.examples import batch_of

# 10 KB each: random bytes do not compress.
MANY = [batch_of(Record(1, payload=random.Random(n).randbytes(10_000)), first=n, site=SITE) for n in range(40)]


class Gate:
    """A classifier that waits until it is opened, and counts how many wait."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.waiting = self.waiting_max = 0
        self._lock = threading.Lock()

    def classify(self, batch: RecordBatch) -> Verdict:
        with self._lock:
            self.waiting += 1
            self.waiting_max = max(self.waiting_max, self.waiting)
        assert self.opened.wait(20)
        with self._lock:
            self.waiting -= 1
        return by_text(batch)


@pytest.mark.parametrize("limits", [{"held_messages_max": 6}, {"held_bytes_max": 1 << 16}])
async def test_what_is_in_hand_is_bounded_and_what_is_put_aside_comes_again(
    mqtt_broker: MqttBroker, kafka_broker: KafkaBroker, tmp_path: Path, limits: dict[str, int]
) -> None:
    gate = Gate()
    inbox = InboxConfig(window_messages_max=4, **limits)
    config = gateway_config(mqtt_broker.port, kafka_broker.bootstrap, tmp_path, inbox=inbox)
    async with running(config, classify=gate.classify) as gateway, Device(mqtt_broker.port) as device:
        for batch in MANY:
            await device.send(batch)
        await until(lambda: gate.waiting, "the first is being classified")
        await until(lambda: mqtt_broker.name != "embedded" or gateway.events("inbox_shed"), "some was put aside")
        assert gateway.path.inbox.held <= 6
        gate.opened.set()
        await device.deliver(MANY)
        exported = await gateway.exported()
    assert {b.first_sequence for b in exported} == set(range(40))
    assert len(exported) == 40


@pytest.mark.parametrize(
    "limits", [{"window_messages_max": 3}, {"window_messages_max": 64, "decoded_bytes_max": 1 << 16}]
)
async def test_no_more_is_worked_on_than_the_window_allows(
    mqtt_broker: MqttBroker, kafka_broker: KafkaBroker, tmp_path: Path, limits: dict[str, int]
) -> None:
    """With less room than one envelope may need decompressed, one at a time still passes."""
    gate = Gate()
    config = gateway_config(
        mqtt_broker.port,
        kafka_broker.bootstrap,
        tmp_path,
        inbox=InboxConfig(**limits),
        routing=RoutingConfig(threads=16),
    )
    async with running(config, classify=gate.classify) as gateway, Device(mqtt_broker.port) as device:
        for batch in MANY[:20]:
            await device.send(batch)
        allowed = 3 if limits["window_messages_max"] == 3 else 1
        await until(lambda: gate.waiting == allowed and gateway.path.inbox.held >= allowed, "the window is full")
        gate.opened.set()
        await device.deliver(MANY[:20])
        assert gate.waiting_max == allowed


async def test_what_a_dead_gateway_had_not_acknowledged_comes_to_the_next(
    mqtt_broker: MqttBroker, kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    """A gateway that vanishes without a word; its successor has the same session."""
    config = gateway_config(mqtt_broker.port, kafka_broker.bootstrap, tmp_path)
    async with Device(mqtt_broker.port) as device:

        def vanish() -> None:
            with MqttClient(f"sluice-gateway-{SITE}", mqtt_broker.port) as dead:
                dead.subscribe(f"sluice/v1/{SITE}/+/up")
                asyncio.run_coroutine_threadsafe(device.send(MANY[0]), loop).result(20)
                assert dead.next().payload
                dead.vanish()

        loop = asyncio.get_running_loop()
        await asyncio.to_thread(vanish)
        async with running(config) as gateway:
            await device.settled(MANY[0])
            assert len(await gateway.exported()) == 1


async def test_a_connection_that_breaks_voids_its_acknowledgements_only(
    mqtt_broker: MqttBroker, mqtt_proxy: FaultProxy, kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    """Work goes on over the break: it is settled once, and acknowledged on the new connection."""
    gate = Gate()
    config = gateway_config(mqtt_proxy.port, kafka_broker.bootstrap, tmp_path)
    async with running(config, classify=gate.classify) as gateway, Device(mqtt_broker.port) as device:
        await device.send(MANY[0])
        await until(lambda: gate.waiting == 1, "under way")
        mqtt_proxy.cut()
        await until(lambda: gateway.events("mqtt_disconnected"), "the break was noticed")
        gate.opened.set()
        await device.settled(MANY[0])
        await device.send(MANY[1])
        await device.settled(MANY[1])
        assert len(await gateway.exported()) == 2
        assert gateway.path.inbox.held == 0


def message(number: int, qos: int) -> Message:
    return Message(f"sluice/v1/{SITE}/device-{number}/up", bytes(1 << 16), False, number + 1, qos, 0)


async def test_messages_without_a_puback_cannot_pile_up() -> None:
    """Nothing slows down who sends with QoS 0: what there is no room for is forgotten, not noted."""
    telemetry = Telemetry("gateway", stream=io.StringIO())
    config = InboxConfig(window_messages_max=1, held_messages_max=2, held_bytes_max=1 << 16)

    async def refuse(_refusal: Refusal) -> None: ...

    inbox = Inbox(config, MqttConfig(), Limits(), SITE, telemetry, refuse)
    gc.collect()
    for number in range(500):
        inbox._receive(message(number, qos=0))  # the session's callback
    assert inbox.held == 1
    assert sum(type(o) is Slot for o in gc.get_objects()) <= 1
    assert telemetry.registry.get_sample_value("sluice_inbox_shed_messages_total") == 499


async def test_status_messages_without_a_puback_cannot_pile_up_behind_one_that_waits() -> None:
    telemetry = Telemetry("gateway", stream=io.StringIO())
    writer: Any = None
    relay = StatusRelay(StatusConfig(), MqttConfig(), "c", SITE, writer, "t", telemetry)
    gc.collect()
    status = control_pb2.Status(site=SITE, spool_id=bytes(16))
    for number in range(300):
        status.device_id = f"device-{number > 0}"
        topic = f"sluice/v1/{SITE}/{status.device_id}/status"
        relay._receive(Message(topic, status.SerializeToString(), False, 1, int(number == 0), 0))  # as above
    assert sum(type(o) is Slot for o in gc.get_objects()) <= 2
