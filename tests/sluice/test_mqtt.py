"""A session comes back after every kind of trouble, says so, and never takes an answer for what it is not."""

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from sluice.connections import MqttConfig
from sluice.demo.loopback import free_port
from sluice.errors import Backpressure, ConfigError, Permanent, Retryable
from sluice.mqtt import NO_MATCHING_SUBSCRIBERS, Message, MqttSession, Will
from sluice.telemetry import Telemetry
from tests.brokers.base import MqttBroker
from tests.brokers.proxy import Direction, FaultProxy

UP = "sluice/v1/site/device/up"
ALL_UP = "sluice/v1/+/+/up"
TIMEOUT_S = 10.0


class Peer:
    """A session in its task, with what it received and said."""

    def __init__(self, port: int, client_id: str, settings: dict[str, Any] | None = None, **options: Any) -> None:
        self.inbox: asyncio.Queue[Message] = asyncio.Queue()
        self.connections: list[bool] = []
        self.log = io.StringIO()
        config = MqttConfig(port=port, reconnect_delay_s_max=0.3, **(settings or {}))
        options = {"on_message": self.inbox.put_nowait, "on_connection": self._note} | options
        self.session = MqttSession(config, client_id=client_id, telemetry=Telemetry("test", stream=self.log), **options)
        self.changed = asyncio.Event()

    def _note(self, up: bool) -> None:
        self.connections.append(up)
        self.changed.set()

    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in self.log.getvalue().splitlines()]

    async def next(self) -> Message:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.inbox.get()

    async def until(self, check: Callable[[], object]) -> None:
        """Waits until the check holds; looks again whenever the loop had a turn."""
        async with asyncio.timeout(TIMEOUT_S):
            while not check():  # noqa: ASYNC110 - what is checked has no event
                await asyncio.sleep(0.01)

    async def connected(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await self.session.wait_connected()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Peer"]:
        task = asyncio.create_task(self.session.run())
        try:
            yield self
        finally:
            await self.session.stop()
            async with asyncio.timeout(TIMEOUT_S):
                await task


async def test_messages_arrive_in_order_and_manual_acks_settle_them(mqtt_broker: MqttBroker) -> None:
    device = Peer(mqtt_broker.port, "device")
    async with device.running():
        await device.connected()
        gateway = Peer(mqtt_broker.port, "gateway", subscriptions=[ALL_UP], manual_ack=True)
        async with gateway.running():
            await gateway.connected()
            for number in range(4):
                await device.session.publish(UP, b"%d" % number)
            received = [await gateway.next() for _ in range(4)]
            assert [message.payload for message in received] == [b"0", b"1", b"2", b"3"]
            for message in received[:2]:
                gateway.session.ack(message)
        again = Peer(mqtt_broker.port, "gateway", subscriptions=[ALL_UP], manual_ack=True)
        async with again.running():
            assert [(await again.next()).payload for _ in range(2)] == [b"2", b"3"]


async def test_an_acknowledgement_of_an_earlier_connection_is_void(
    mqtt_broker: MqttBroker, mqtt_proxy: FaultProxy
) -> None:
    """Message ids are reused: an old acknowledgement would settle a message that nobody has seen yet."""
    gateway = Peer(mqtt_proxy.port, "gateway", subscriptions=[ALL_UP], manual_ack=True)
    device = Peer(mqtt_broker.port, "device")
    async with device.running(), gateway.running():
        await gateway.connected()
        await device.connected()
        await device.session.publish(UP, b"first")
        old = await gateway.next()
        mqtt_proxy.cut()
        new = await gateway.next()
        assert (new.payload, new.epoch > old.epoch) == (b"first", True)
        gateway.session.ack(old)
        mqtt_proxy.cut()
        newest = await gateway.next()
        assert newest.payload == b"first"
        gateway.session.ack(newest)
        await device.session.publish(UP, b"second")
        assert (await gateway.next()).payload == b"second"
        assert gateway.inbox.empty()


async def test_a_broker_that_is_away_is_waited_for_and_named() -> None:
    port = free_port()
    peer = Peer(port, "device")
    async with peer.running():
        await peer.until(lambda: peer.events().count("mqtt_connect_failed") >= 3)
        assert f"127.0.0.1:{port}" in peer.log.getvalue()
        assert "Connection refused" in peer.log.getvalue()
        with pytest.raises(Retryable, match="not connected"):
            await peer.session.publish(UP, b"x")
    assert peer.connections == []


async def test_a_broker_that_comes_late_is_found_without_a_false_alarm(mqtt_broker: MqttBroker) -> None:
    mqtt_broker.stop()
    peer = Peer(mqtt_broker.port, "device")
    async with peer.running():
        await peer.until(lambda: "mqtt_connect_failed" in peer.events())
        await asyncio.to_thread(mqtt_broker.start)
        await peer.connected()
        assert peer.connections == [True]
        assert "mqtt_session_lost" not in peer.events()


async def test_a_restarted_broker_is_found_again_and_a_forgotten_session_is_an_event(mqtt_broker: MqttBroker) -> None:
    peer = Peer(mqtt_broker.port, "device", subscriptions=[ALL_UP])
    async with peer.running():
        await peer.connected()
        mqtt_broker.kill()
        await peer.until(lambda: peer.connections == [True, False])
        await asyncio.to_thread(mqtt_broker.wipe)
        await asyncio.to_thread(mqtt_broker.start)
        await peer.until(lambda: peer.connections == [True, False, True])
        assert {"mqtt_disconnected", "mqtt_session_lost"} <= set(peer.events())
        await peer.session.publish(UP, b"back")
        assert (await peer.next()).payload == b"back"


async def test_a_broker_that_accepts_and_says_nothing_is_given_up(mqtt_broker: MqttBroker) -> None:
    with FaultProxy(mqtt_broker.port) as proxy:
        proxy.hang(Direction.DOWN)
        peer = Peer(proxy.port, "device", {"connect_timeout_s": 0.2})
        async with peer.running():
            await peer.until(lambda: peer.events().count("mqtt_connect_failed") >= 2)
            assert "no answer within mqtt.connect_timeout_s = 0.2" in peer.log.getvalue()
            assert set(peer.events()) == {"mqtt_connect_failed"}
            proxy.heal()
            await peer.connected()
        assert peer.connections == [True, False]


async def test_a_connection_that_hangs_is_found_by_the_keep_alive(
    mqtt_broker: MqttBroker, mqtt_proxy: FaultProxy
) -> None:
    peer = Peer(mqtt_proxy.port, "device", {"keepalive_s": 1})
    async with peer.running():
        await peer.connected()
        mqtt_proxy.hang()
        waiting = asyncio.create_task(peer.session.publish(UP, b"x"))
        await peer.until(lambda: peer.connections == [True, False])
        with pytest.raises(Retryable, match="connection ended"):
            await waiting
        mqtt_proxy.heal()
        await peer.connected()


@pytest.mark.parametrize("fault", ["cut", "refuse"])
async def test_what_is_in_flight_when_a_connection_ends_fails_as_retryable(
    mqtt_broker: MqttBroker, mqtt_proxy: FaultProxy, fault: str
) -> None:
    peer = Peer(mqtt_proxy.port, "device")
    async with peer.running():
        await peer.connected()
        mqtt_proxy.hang(Direction.DOWN)
        waiting = [asyncio.create_task(peer.session.publish(UP, b"x")) for _ in range(5)]
        await asyncio.sleep(0)
        getattr(mqtt_proxy, fault)()
        outcomes = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), TIMEOUT_S)
        assert [type(outcome) for outcome in outcomes] == [Retryable] * 5
        mqtt_proxy.heal()
        await peer.connected()
        await asyncio.wait_for(peer.session.publish(UP, b"x"), TIMEOUT_S)


async def test_publications_in_flight_are_bounded(mqtt_broker: MqttBroker, mqtt_proxy: FaultProxy) -> None:
    peer = Peer(mqtt_proxy.port, "device", inflight_max=2)
    async with peer.running():
        await peer.connected()
        mqtt_proxy.hang(Direction.DOWN)
        waiting = [asyncio.create_task(peer.session.publish(UP, b"x")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Backpressure) as caught:
            await peer.session.publish(UP, b"one too many")
        assert caught.value.retry_after_s > 0
        mqtt_proxy.heal()
        await asyncio.wait_for(asyncio.gather(*waiting), TIMEOUT_S)
        await peer.session.publish(UP, b"fits again")


async def test_a_cancelled_publication_does_not_settle_another(mqtt_broker: MqttBroker, mqtt_proxy: FaultProxy) -> None:
    peer = Peer(mqtt_proxy.port, "device")
    async with peer.running():
        await peer.connected()
        mqtt_proxy.hang(Direction.DOWN)
        first, second = (asyncio.create_task(peer.session.publish(UP, b"x")) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        mqtt_proxy.heal()
        assert await asyncio.wait_for(second, TIMEOUT_S) in {0, NO_MATCHING_SUBSCRIBERS}
        assert first.cancelled()


async def test_stop_does_not_wait_for_a_network_that_hangs(mqtt_broker: MqttBroker, mqtt_proxy: FaultProxy) -> None:
    """With more on the way than the kernel's buffers take, paho would wait for the keep-alive: a minute and more."""
    peer = Peer(mqtt_proxy.port, "device", {"keepalive_s": 60})
    task = asyncio.create_task(peer.session.run())
    await peer.connected()
    mqtt_proxy.hang()
    waiting = [asyncio.create_task(peer.session.publish(UP, bytes(1 << 20))) for _ in range(30)]
    await asyncio.sleep(0)
    await peer.session.stop()
    await asyncio.wait_for(task, 5.0)
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {Retryable}


@pytest.mark.parametrize("when", ["before", "during"])
async def test_stop_before_or_during_the_first_connection_ends_the_run(mqtt_broker: MqttBroker, when: str) -> None:
    peer = Peer(mqtt_broker.port, "device")
    if when == "before":
        await peer.session.stop()
    task = asyncio.create_task(peer.session.run())
    await asyncio.sleep(0)
    await peer.session.stop()
    await peer.session.stop()
    await asyncio.wait_for(task, TIMEOUT_S)
    assert not peer.session.connected


async def test_the_will_is_published_when_a_device_vanishes_and_not_when_it_leaves(
    mqtt_broker: MqttBroker, mqtt_proxy: FaultProxy
) -> None:
    status = "sluice/v1/site/device/status"
    gateway = Peer(mqtt_broker.port, "gateway", subscriptions=["sluice/v1/+/+/status"])
    device = Peer(mqtt_proxy.port, "device", will=Will(status, b"gone"))
    async with gateway.running():
        await gateway.connected()
        async with device.running():
            await device.connected()
        async with Peer(mqtt_proxy.port, "device", will=Will(status, b"gone")).running() as second:
            await second.connected()
            await second.session.publish(status, b"here", retain=True)
            assert (await gateway.next()).payload == b"here"
            mqtt_proxy.refuse()
            assert (await gateway.next()).payload == b"gone"


async def test_retained_messages_come_with_a_new_subscription_and_not_with_every_reconnect(
    mqtt_broker: MqttBroker, mqtt_proxy: FaultProxy
) -> None:
    status = "sluice/v1/site/device/status"
    device = Peer(mqtt_broker.port, "device")
    gateway = Peer(mqtt_proxy.port, "gateway", subscriptions=["sluice/v1/+/+/status"])
    async with device.running():
        await device.connected()
        await device.session.publish(status, b"retained", retain=True)
        async with gateway.running():
            assert (await gateway.next()).retain
            await gateway.session.publish(UP, b"x")  # answered behind our PUBACK, which a cut might lose
            mqtt_proxy.cut()
            await gateway.until(lambda: gateway.connections == [True, False, True])
            await device.session.publish(status, b"live")
            assert (await gateway.next()).payload == b"live"


async def test_a_handler_that_fails_does_not_end_the_session(mqtt_broker: MqttBroker) -> None:
    seen: list[bytes] = []

    def handle(message: Message) -> None:
        seen.append(message.payload)
        if message.payload == b"bad":
            raise ValueError("no idea")

    peer = Peer(mqtt_broker.port, "device", subscriptions=[ALL_UP], on_message=handle)
    async with peer.running():
        await peer.connected()
        for payload in (b"bad", b"good"):
            await peer.session.publish(UP, payload)
        await peer.until(lambda: seen == [b"bad", b"good"])
        assert "mqtt_callback_failed" in peer.events()
    assert peer.connections == [True, False]


async def test_two_clients_with_one_id_do_not_storm_the_broker(mqtt_broker: MqttBroker) -> None:
    """Each takes the other's place; the back-off grows, since a short connection is no success."""
    one, two = (Peer(mqtt_broker.port, "same") for _ in range(2))
    one.session._backoff._max_s = two.session._backoff._max_s = 30.0
    async with one.running(), two.running():
        await one.until(lambda: len(one.connections) + len(two.connections) > 8)
        await one.until(lambda: one.session._backoff._attempt + two.session._backoff._attempt >= 4)


async def test_tls_files_that_cannot_be_used_are_named(mqtt_broker: MqttBroker) -> None:
    peer = Peer(mqtt_broker.port, "device", {"ca_file": "/nowhere/ca.pem"})
    with pytest.raises(ConfigError, match=r"/nowhere/ca\.pem"):
        await peer.session.run()


async def test_a_packet_that_the_broker_would_not_take_is_refused_before_it_ends_the_connection(
    mqtt_broker: MqttBroker,
) -> None:
    peer = Peer(mqtt_broker.port, "device")
    async with peer.running():
        await peer.connected()
        peer.session._packet_limit = 1000  # as from a CONNACK with MaximumPacketSize
        with pytest.raises(Permanent, match="at most 1000 bytes"):
            await peer.session.publish(UP, bytes(1000))
        assert await peer.session.publish(UP, bytes(900)) in {0, NO_MATCHING_SUBSCRIBERS}
        assert peer.connections == [True]
