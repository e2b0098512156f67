"""An MQTT 5 broker that lives in memory, and fails as told.

Without faults it passes the conformance suite that the embedded broker and Mosquitto pass (`test_conformance`). Its
faults are those that were measured on real ones: PUBACKed messages that vanish, a restart without memory, messages
that come again after a reconnect, damage that only a checksum of ours would find.
"""

from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

from protos import record_pb2
from tests.sim.world import World

QUEUE_MESSAGES_MAX = 1000


class Delivered(NamedTuple):
    """A message as a subscriber gets it; acknowledge it by its `mid`, which means nothing after a reconnect."""

    topic: str
    payload: bytes
    retain: bool
    mid: int


class _Queued(NamedTuple):
    topic: str
    payload: bytes
    retain: bool


@dataclass
class _Session:
    filters: list[str] = field(default_factory=list)
    queue: deque[_Queued] = field(default_factory=deque)
    unacknowledged: dict[int, _Queued] = field(default_factory=dict)
    next_mid: int = 1


class FakeMqtt:
    """The broker.

    Args:
        world: chance and faults; none: it never fails.
        receive_max: unacknowledged messages per client.
    """

    def __init__(self, world: World | None = None, receive_max: int = 100) -> None:
        self._world = world or World(0)
        if world is None:
            self._world.calm()
        self._receive_max = receive_max
        self._sessions: dict[str, _Session] = {}
        self._retained: dict[str, bytes] = {}

    @property
    def queued_messages(self) -> int:
        """Messages that wait for a subscriber or for its acknowledgement."""
        return sum(len(session.queue) + len(session.unacknowledged) for session in self._sessions.values())

    def connect(self, client_id: str) -> bool:
        """A (re)connect without a clean start. Returns whether there was a session."""
        known = client_id in self._sessions
        session = self._sessions.setdefault(client_id, _Session())
        session.queue.extendleft(reversed(session.unacknowledged.values()))
        session.unacknowledged.clear()
        session.next_mid = 1  # ids are reused, as paho and brokers do
        return known

    def subscribe(self, client_id: str, topic_filter: str) -> None:
        """QoS 1; retained messages come when the subscription is new."""
        session = self._sessions[client_id]
        if topic_filter in session.filters:
            return
        session.filters.append(topic_filter)
        for topic, payload in self._retained.items():
            if _matches(topic_filter, topic):
                session.queue.append(_Queued(topic, payload, True))

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Returns with the PUBACK, which promises nothing."""
        faults = self._world.faults
        if retain:
            self._retained[topic] = payload
        if self._world.chance(faults.lose):
            return
        if topic.endswith("/up") and self._world.chance(faults.corrupt):
            payload = self._damaged(payload)
        for session in self._sessions.values():
            if any(_matches(each, topic) for each in session.filters):
                for _ in range(1 + self._world.chance(faults.duplicate)):
                    self._enqueue(session, _Queued(topic, payload, False))

    def receive(self, client_id: str) -> Delivered | None:
        """The next message, or None when there is none or too many are unacknowledged."""
        session = self._sessions[client_id]
        if not session.queue or len(session.unacknowledged) >= self._receive_max:
            return None
        message = session.queue.popleft()
        mid = session.next_mid
        session.next_mid += 1
        session.unacknowledged[mid] = message
        return Delivered(*message, mid)

    def acknowledge(self, client_id: str, mid: int) -> None:
        """PUBACK: the message does not come again."""
        self._sessions[client_id].unacknowledged.pop(mid, None)

    def forget(self) -> None:
        """A restart without persistence."""
        self._sessions.clear()
        self._retained.clear()

    def _enqueue(self, session: _Session, message: _Queued) -> None:
        at = len(session.queue)
        if at and self._world.chance(self._world.faults.reorder):
            at = self._world.rng.randrange(at)
        session.queue.insert(at, message)
        if len(session.queue) > QUEUE_MESSAGES_MAX:
            session.queue.popleft()  # as measured: the oldest goes, silently

    def _damaged(self, payload: bytes) -> bytes:
        """One bit of an envelope's records flips: the part that has a checksum. (TCP and TLS vouch for the rest.)"""
        body = record_pb2.Envelope.FromString(payload).batch
        if not body:
            return payload
        at = payload.index(body) + self._world.rng.randrange(len(body))
        return payload[:at] + bytes([payload[at] ^ 1 << self._world.rng.randrange(8)]) + payload[at + 1 :]


class FakeMqttClient:
    """One client, with the methods of `tests.brokers.clients.MqttClient`, for the conformance suite."""

    def __init__(self, broker: FakeMqtt, client_id: str) -> None:
        self._broker = broker
        self._client_id = client_id
        self.session_present = False

    def __enter__(self) -> Self:
        self.session_present = self._broker.connect(self._client_id)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """A session outlives its connection."""

    def subscribe(self, topic_filter: str) -> None:
        self._broker.subscribe(self._client_id, topic_filter)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> str:
        self._broker.publish(topic, payload, retain=retain)
        return "Success"

    def next(self) -> Delivered:
        message = self._broker.receive(self._client_id)
        assert message is not None, "no message"
        return message

    def acknowledge(self, message: Delivered) -> bytes:
        self._broker.acknowledge(self._client_id, message.mid)
        return message.payload

    def take(self, count: int) -> list[bytes]:
        return [self.acknowledge(self.next()) for _ in range(count)]


def _matches(topic_filter: str, topic: str) -> bool:
    levels, names = topic_filter.split("/"), topic.split("/")
    return len(levels) == len(names) and all(a in {"+", b} for a, b in zip(levels, names, strict=True))
