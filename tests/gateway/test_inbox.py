"""What the inbox holds is bounded, whatever the broker sends; and nothing that it puts aside is lost."""
# ruff: noqa: F811 - a fixture that is imported has the name of the argument that asks for it

import asyncio
import random
import threading
from pathlib import Path

import pytest

from gateway.batches import Verdict
from gateway.path_config import InboxConfig, RoutingConfig
from sluice.record import Record, RecordBatch
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
