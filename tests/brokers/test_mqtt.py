"""What both MQTT brokers promise to the code that is tested on them."""

import psutil

from tests.brokers.base import MqttBroker
from tests.brokers.clients import MqttClient, eventually
from tests.brokers.proxy import FaultProxy

UP = "sluice/v1/site/device/up"
STATUS = "sluice/v1/site/device/status"
ALL_UP = "sluice/v1/+/+/up"


def test_messages_arrive_in_order_with_their_properties(mqtt_broker: MqttBroker) -> None:
    with MqttClient("gateway", mqtt_broker.port) as gateway, MqttClient("device", mqtt_broker.port) as device:
        gateway.subscribe(ALL_UP)
        for number in range(50):
            assert device.publish(UP, b"%d" % number, user=[("n", str(number))]) == "Success"
        messages = [gateway.next() for _ in range(50)]
    assert [message.payload for message in messages] == [b"%d" % number for number in range(50)]
    assert {message.topic for message in messages} == {UP}
    assert [dict(message.properties.UserProperty)["n"] for message in messages] == [str(n) for n in range(50)]


def test_an_envelope_of_two_mebibytes_passes(mqtt_broker: MqttBroker) -> None:
    payload = bytes(range(256)) * 8192
    with MqttClient("gateway", mqtt_broker.port) as gateway, MqttClient("device", mqtt_broker.port) as device:
        gateway.subscribe(ALL_UP)
        device.publish(UP, payload)
        assert gateway.take(1) == [payload]


def test_what_was_not_acknowledged_comes_again_and_the_rest_does_not(mqtt_broker: MqttBroker) -> None:
    with MqttClient("device", mqtt_broker.port) as device:
        with MqttClient("gateway", mqtt_broker.port) as gateway:
            gateway.subscribe(ALL_UP)
            for payload in (b"a", b"b", b"c"):
                device.publish(UP, payload)
            assert gateway.take(1) == [b"a"]
            assert [gateway.next().payload for _ in range(2)] == [b"b", b"c"]
        device.publish(UP, b"while away")
        with MqttClient("gateway", mqtt_broker.port) as gateway:
            assert gateway.session_present
            assert gateway.take(3) == [b"b", b"c", b"while away"]


def test_a_retained_status_reaches_who_comes_later(mqtt_broker: MqttBroker) -> None:
    with MqttClient("device", mqtt_broker.port) as device:
        device.publish(STATUS, b"old", retain=True)
        device.publish(STATUS, b"new", retain=True)
    with MqttClient("gateway", mqtt_broker.port) as gateway:
        gateway.subscribe("sluice/v1/+/+/status")
        message = gateway.next()
        assert (message.payload, message.retain) == (b"new", True)


def test_the_last_will_is_published_when_a_connection_is_cut(mqtt_broker: MqttBroker, mqtt_proxy: FaultProxy) -> None:
    with MqttClient("gateway", mqtt_broker.port) as gateway:
        gateway.subscribe("sluice/v1/+/+/status")
        device = MqttClient("device", mqtt_proxy.port, will=(STATUS, b"gone"))
        with device:
            device.vanish()
            assert gateway.take(1) == [b"gone"]


def test_a_restart_keeps_sessions_and_queues_where_the_broker_is_durable(mqtt_broker: MqttBroker) -> None:
    with MqttClient("gateway", mqtt_broker.port) as gateway:
        gateway.subscribe(ALL_UP)
    with MqttClient("device", mqtt_broker.port) as device:
        device.publish(UP, b"queued")
    mqtt_broker.restart()
    with MqttClient("gateway", mqtt_broker.port) as gateway:
        assert gateway.session_present is mqtt_broker.durable
        assert gateway.take(int(mqtt_broker.durable)) == [b"queued"] * mqtt_broker.durable


def test_a_wiped_broker_has_forgotten_everything(mqtt_broker: MqttBroker) -> None:
    with MqttClient("gateway", mqtt_broker.port) as gateway:
        gateway.subscribe(ALL_UP)
    mqtt_broker.kill()
    assert not mqtt_broker.running
    mqtt_broker.wipe()
    mqtt_broker.start()
    with MqttClient("gateway", mqtt_broker.port) as gateway:
        assert gateway.session_present is False


def test_it_listens_on_the_loopback_interface_only(mqtt_broker: MqttBroker) -> None:
    listening = eventually(
        lambda: [one.laddr for one in psutil.Process(mqtt_broker.pid).net_connections() if one.status == "LISTEN"],
        "a listener",
    )
    assert {(address.ip, address.port) for address in listening} == {("127.0.0.1", mqtt_broker.port)}


def test_only_mosquitto_says_that_nobody_listens(mqtt_broker: MqttBroker) -> None:
    """The difference that users of `No matching subscribers` must bear."""
    with MqttClient("device", mqtt_broker.port) as device:
        answer = device.publish("sluice/v1/site/lonely/up", b"x")
    assert answer == ("No matching subscribers" if mqtt_broker.name == "mosquitto" else "Success")
