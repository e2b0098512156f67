"""Small clients for the tests of the brokers themselves: every wait has a deadline, nothing is retried in secret."""

import contextlib
import queue
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

if TYPE_CHECKING:
    from confluent_kafka import Message

TIMEOUT_S = 10.0


def eventually(check: Callable[[], Any], what: str, timeout_s: float = TIMEOUT_S) -> Any:
    """The first true value of `check`; fails with `what` when there is none in time."""
    deadline = time.monotonic() + timeout_s
    while not (value := check()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)
    return value


class MqttClient:
    """One MQTT 5 connection with manual acknowledgements."""

    def __init__(self, client_id: str, port: int, *, clean_start: bool = False, will: tuple[str, bytes] | None = None):
        self.received: queue.Queue[paho.MQTTMessage] = queue.Queue()
        self.reason_codes: dict[int, str] = {}
        self.session_present: bool | None = None
        self._subscribed: set[int] = set()
        self._client = paho.Client(
            paho.CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv5, manual_ack=True
        )
        self._client.on_connect = self._on_connect
        self._client.on_message = lambda _client, _data, message: self.received.put(message)
        self._client.on_publish = self._on_publish
        self._client.on_subscribe = lambda _client, _data, mid, _codes, _properties: self._subscribed.add(mid)
        if will:
            self._client.will_set(will[0], will[1], qos=1, retain=True)
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 3600
        self._client.connect("127.0.0.1", port, clean_start=clean_start, properties=properties)

    def __enter__(self) -> Self:
        self._client.loop_start()
        eventually(lambda: self.session_present is not None, "connected")
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def vanish(self) -> None:
        """Ends the connection without a DISCONNECT, as a process that is killed does."""
        self._client.loop_stop()
        connection = self._client.socket()
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def subscribe(self, topic_filter: str) -> None:
        _, mid = self._client.subscribe(topic_filter, options=SubscribeOptions(qos=1, retainHandling=1))
        eventually(lambda: mid in self._subscribed, f"subscribed to {topic_filter}")

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, user: list[tuple[str, str]] | None = None):
        """Publishes with QoS 1 and waits for the PUBACK; returns its reason code."""
        properties = Properties(PacketTypes.PUBLISH)
        if user:
            properties.UserProperty = user
        info = self._client.publish(topic, payload, qos=1, retain=retain, properties=properties)
        eventually(lambda: info.mid in self.reason_codes, f"PUBACK of {topic}")
        return self.reason_codes[info.mid]

    def next(self, timeout_s: float = TIMEOUT_S) -> paho.MQTTMessage:
        return self.received.get(timeout=timeout_s)

    def take(self, count: int) -> list[bytes]:
        """The next payloads, each acknowledged."""
        return [self.acknowledge(self.next()) for _ in range(count)]

    def acknowledge(self, message: paho.MQTTMessage) -> bytes:
        self._client.ack(message.mid, message.qos)
        return message.payload

    def _on_connect(self, _client: object, _data: object, flags: paho.ConnectFlags, code: Any, _properties: object):
        assert not code.is_failure, code
        self.session_present = flags.session_present

    def _on_publish(self, _client: object, _data: object, mid: int, code: Any, _properties: object) -> None:
        self.reason_codes[mid] = str(code)


def produce(bootstrap: str, topic: str, values: list[bytes], **fields: Any) -> list[tuple[int, int]]:
    """Produces in order and waits for all reports: (partition, offset) of each value, in their order.

    Not idempotently: librdkafka takes half a second to get a producer's number, and this is called hundreds of times.
    """
    from confluent_kafka import Producer

    producer = Producer(
        {
            "bootstrap.servers": bootstrap,
            "acks": "all",
            "max.in.flight.requests.per.connection": 1,
            "message.max.bytes": 4 << 20,
            "reconnect.backoff.max.ms": 200,
        }
    )
    places: list[tuple[int, int] | None] = [None] * len(values)

    def report(index: int) -> Callable[[Any, Any], None]:
        def delivered(error: Any, message: Any) -> None:
            assert error is None, error
            places[index] = (message.partition(), message.offset())

        return delivered

    for index, value in enumerate(values):
        producer.produce(topic, value, on_delivery=report(index), **fields)
        producer.poll(0)
    assert producer.flush(30.0) == 0, "not everything was delivered"
    return [place for place in places if place is not None]


def consume(bootstrap: str, topic: str, partition: int = 0, offset: int = 0) -> list["Message"]:
    """Every message from the offset to the end of the partition, by manual assignment."""
    from confluent_kafka import Consumer, KafkaError, TopicPartition

    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "by-assignment",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "fetch.wait.max.ms": 50,
            "auto.offset.reset": "error",
        }
    )
    consumer.assign([TopicPartition(topic, partition, offset)])
    messages = []
    deadline = time.monotonic() + 20.0
    try:
        while time.monotonic() < deadline:
            for message in consumer.consume(500, 0.2):
                error = message.error()
                if error is None:
                    messages.append(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    return messages
                else:
                    assert error.retriable(), error
        raise AssertionError(f"no end of {topic}[{partition}] in time; {len(messages)} messages so far")
    finally:
        consumer.close()
