"""One MQTT 5 session on an event loop: what the agent's uplink and the gateway's inbox share.

Every connection gets a fresh paho client. paho keeps unacknowledged publications and message ids across its own
reconnects, but our spool decides what is resent, and an id that survives a connection acknowledges the wrong message.
So a connection is an *epoch*: what belongs to an older one is void.

Traps that this module keeps away from its users (each was measured):
  * MQTT 5 only: a 3.1.1 broker answers "Success" to a publication that it denies or drops.
  * v5's default is a clean start: here a stable client id, `clean_start=False` and a session expiry are set, and a
    session that the broker forgot is an event.
  * paho's network thread must not be blocked: callbacks only hand over to the loop.
  * paho has no jitter, no limit on its queue by default, and ignores the broker's ReceiveMaximum: publications in
    flight are limited here, by `inflight_max`.
A connection that hangs is found by the keep-alive: paho drops it when a ping stays unanswered.
"""

import asyncio
import contextlib
import math
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from sluice.backoff import Backoff
from sluice.config import read_secret
from sluice.connections import MqttConfig
from sluice.errors import Backpressure, ConfigError, Permanent, Retryable
from sluice.telemetry import Event, Telemetry

CONNECTED = Event(name="mqtt_connected", unit="connections", help="Connections to the MQTT broker.")
CONNECT_FAILED = Event(
    name="mqtt_connect_failed", unit="attempts", help="Failed attempts to connect to the MQTT broker.", level="warning"
)
DISCONNECTED = Event(
    name="mqtt_disconnected", unit="connections", help="Connections to the MQTT broker that ended.", level="warning"
)
SESSION_LOST = Event(
    name="mqtt_session_lost",
    unit="sessions",
    help="Reconnects at which the broker had forgotten our session.",
    level="warning",
)
SUBSCRIBE_REFUSED = Event(
    name="mqtt_subscribe_refused", unit="subscriptions", help="Subscriptions that the broker refused.", level="error"
)
CALLBACK_FAILED = Event(
    name="mqtt_callback_failed", unit="messages", help="Messages whose handling raised an error.", level="error"
)

# The first delay after a failed connection; it doubles up to mqtt.reconnect_delay_s_max.
_RECONNECT_DELAY_S_FIRST = 0.25
# A connection that ended sooner counts as a failed attempt, or two clients with one id would take each other's place
# many times a second.
_STABLE_S = 5.0
# How long a closing connection may take to send what it has; the network may hang.
_CLOSE_TIMEOUT_S = 1.0
# PUBACK's "accepted, but nobody listens" (MQTT 5, 3.4.2.1).
NO_MATCHING_SUBSCRIBERS = 0x10


@dataclass(frozen=True, slots=True)
class Message:
    """A received publication. `ack` it with the session that gave it."""

    topic: str
    payload: bytes
    retain: bool
    mid: int
    qos: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes, retained, when we vanish."""

    topic: str
    payload: bytes


class MqttSession:
    """A connection that comes back.

    Args:
        config: how to reach the broker.
        client_id: stable; the broker's session belongs to it.
        telemetry: for events.
        subscriptions: topic filters, subscribed with QoS 1 on every connection.
        on_message: called on the loop for every message; must be quick.
        on_connection: called on the loop with True when connected and subscribed, with False when that ends.
        will: published by the broker when this client vanishes; a callable is asked before every connection.
        manual_ack: messages are acknowledged by `ack`; otherwise before `on_message` is called.
        receive_max: unacknowledged QoS 1 messages that the broker may have sent us.
        packet_bytes_max: packets above this are never sent to us by the broker.
        inflight_max: our publications that wait for a PUBACK.
    """

    def __init__(
        self,
        config: MqttConfig,
        *,
        client_id: str,
        telemetry: Telemetry,
        subscriptions: Sequence[str] = (),
        on_message: Callable[[Message], None] | None = None,
        on_connection: Callable[[bool], None] | None = None,
        will: Will | Callable[[], Will] | None = None,
        manual_ack: bool = False,
        receive_max: int = 64,
        packet_bytes_max: int = 4 * 1024 * 1024,
        inflight_max: int = 64,
    ) -> None:
        self._config = config
        self._client_id = client_id
        self._telemetry = telemetry
        self._subscriptions = list(subscriptions)
        self._on_message = on_message or (lambda _message: None)
        self._on_connection = on_connection or (lambda _up: None)
        self._will = will
        self._manual_ack = manual_ack
        self._receive_max = receive_max
        self._packet_bytes_max = packet_bytes_max
        self._inflight_max = inflight_max
        self._inflight_limit = inflight_max
        self._packet_limit: int | None = None
        self._had_session = False
        self._client: paho.Client | None = None
        self._pending: dict[int, asyncio.Future[int]] = {}
        self._down: asyncio.Event = asyncio.Event()
        self._up: asyncio.Event = asyncio.Event()
        self._stopping = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._backoff = Backoff(_RECONNECT_DELAY_S_FIRST, max(_RECONNECT_DELAY_S_FIRST, config.reconnect_delay_s_max))
        self.epoch = 0

    @property
    def connected(self) -> bool:
        """Whether the session is connected and subscribed."""
        return self._up.is_set()

    @property
    def publish_slots(self) -> int:
        """How many publications may start now."""
        return max(0, self._inflight_limit - len(self._pending)) if self.connected else 0

    async def wait_connected(self) -> None:
        """Returns when connected and subscribed."""
        await self._up.wait()

    async def run(self) -> None:
        """Keeps the session connected until `stop`; waits with back-off while the broker is away, and says so."""
        self._loop = asyncio.get_running_loop()
        try:
            while not self._stopping.is_set():
                await self._connection()
                if not self._stopping.is_set():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._stopping.wait(), self._backoff.next_s())
        finally:
            self._fail_pending("session stopped")

    async def stop(self) -> None:
        """Ends the session politely (the will is not published); `run` returns afterwards."""
        self._stopping.set()
        if self._client is not None:
            self._client.disconnect()
        self._down.set()

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
        """Publishes with QoS 1 and waits for the broker's answer.

        Returns:
            The PUBACK's reason code: 0, or `NO_MATCHING_SUBSCRIBERS`. It promises nothing beyond the broker.

        Raises:
            Retryable: not connected, or the connection ended before the answer, or the broker refused.
            Backpressure: `inflight_max` publications (or the broker's ReceiveMaximum, if lower) wait already.
            Permanent: larger than the broker's MaximumPacketSize; it would end the connection, each time.
        """
        client = self._client
        if client is None or not self._up.is_set():
            raise Retryable(f"not connected to the MQTT broker at {self._address}")
        if len(self._pending) >= self._inflight_limit:
            raise Backpressure(f"{self._inflight_limit} publications in flight", retry_after_s=0.05)
        self._check_size(topic, payload)
        info = client.publish(topic, payload, qos=1, retain=retain)
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise Retryable(f"MQTT publish to {topic}: {paho.error_string(info.rc)}")
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        # on_publish hands over with call_soon_threadsafe, so it cannot run before this line.
        self._pending[info.mid] = future
        try:
            code = await future
        finally:
            if self._pending.get(info.mid) is future:  # not one of a later connection with the same id
                del self._pending[info.mid]
        if code >= 0x80:
            name = ReasonCode(PacketTypes.PUBACK, identifier=code).getName()
            raise Retryable(f"MQTT broker at {self._address} refused a publication to {topic}: {name}")
        return code

    def ack(self, message: Message) -> None:
        """Sends the PUBACK of a message of this connection; one of an earlier connection is void and ignored.

        Acknowledge in the order of receipt (MQTT-4.6.0-2).
        """
        if self._client is not None and message.epoch == self.epoch and message.qos:
            self._client.ack(message.mid, message.qos)

    @property
    def _address(self) -> str:
        return f"{self._config.host}:{self._config.port}"

    def _check_size(self, topic: str, payload: bytes) -> None:
        # Fixed header of 5 bytes, topic length, packet id, no properties.
        size = len(payload) + len(topic.encode()) + 10
        if self._packet_limit is not None and size > self._packet_limit:
            limit = f"the broker at {self._address} takes packets of at most {self._packet_limit} bytes"
            raise Permanent(f"MQTT publish of {len(payload)} bytes to {topic}: {limit}")

    async def _connection(self) -> None:
        """One connection, from connect to its end."""
        self.epoch += 1
        self._down = asyncio.Event()
        client = self._new_client()
        started = False
        since = math.inf
        try:
            await asyncio.to_thread(self._connect, client)
            self._client = client
            client.loop_start()
            started = True
            await self._until_up()
            since = asyncio.get_running_loop().time()
            await self._down.wait()
        except OSError as error:
            self._telemetry.emit(CONNECT_FAILED, broker=self._address, detail=str(error))
        finally:
            self._client = None  # from here on its callbacks are void
            self._fail_pending("connection ended")
            if asyncio.get_running_loop().time() - since >= _STABLE_S:
                self._backoff.reset()
            if self._up.is_set():
                self._up.clear()
                self._on_connection(False)
            if started:
                await _close(client)

    async def _until_up(self) -> None:
        """Returns when connected and subscribed, or down; raises TimeoutError (an OSError) when all is silent."""
        timeout_s = self._config.connect_timeout_s
        ends = [asyncio.create_task(event.wait()) for event in (self._up, self._down)]
        try:
            done, _ = await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in ends:
                task.cancel()
        if not done:
            raise TimeoutError(f"no answer within mqtt.connect_timeout_s = {timeout_s}")

    def _new_client(self) -> paho.Client:
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            protocol=paho.MQTTv5,
            reconnect_on_failure=False,
            manual_ack=self._manual_ack,
        )
        epoch = self.epoch
        client.suppress_exceptions = True
        client.connect_timeout = self._config.connect_timeout_s
        client.max_inflight_messages_set(self._inflight_max)
        client.max_queued_messages_set(self._inflight_max)
        if self._config.username is not None:
            client.username_pw_set(self._config.username, read_secret(self._config.password_file, "mqtt.password_file"))
        if self._config.ca_file is not None:
            self._set_tls(client)
        if self._will is not None:
            will = self._will() if callable(self._will) else self._will
            client.will_set(will.topic, will.payload, qos=1, retain=True)
        client.on_connect = self._handler(epoch, self._connected)
        client.on_subscribe = self._handler(epoch, self._subscribed)
        client.on_disconnect = self._handler(epoch, self._disconnected)
        client.on_publish = self._handler(epoch, self._published)
        # What was received is handed over even when the connection has ended since: it may be acknowledged already.
        client.on_message = self._handler(epoch, self._received, late=True)
        return client

    def _set_tls(self, client: paho.Client) -> None:
        config = self._config
        try:
            client.tls_set(config.ca_file, config.certificate_file, config.key_file, cert_reqs=ssl.CERT_REQUIRED)
        except (OSError, ValueError) as error:
            files = ", ".join(f for f in (config.ca_file, config.certificate_file, config.key_file) if f)
            raise ConfigError(f"mqtt: cannot use the TLS files {files}: {error}") from error

    def _connect(self, client: paho.Client) -> None:
        config = self._config
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = config.session_expiry_s
        properties.ReceiveMaximum = self._receive_max
        properties.MaximumPacketSize = self._packet_bytes_max
        client.connect(config.host, config.port, config.keepalive_s, clean_start=False, properties=properties)

    def _handler(self, epoch: int, method: Callable[..., None], *, late: bool = False) -> Callable[..., None]:
        """A paho callback that runs `method` on the loop, if the connection is still the current one.

        A CONNACK that comes after we gave up must not open a dead connection; `late` says that it does no harm.
        """

        def on_loop(arguments: tuple[Any, ...]) -> None:
            if epoch == self.epoch and (late or self._client is not None):
                method(*arguments)

        def on_network_thread(_client: paho.Client, _userdata: Any, *arguments: Any) -> None:
            # A closed loop means that the process is ending; nobody is left to care.
            with contextlib.suppress(RuntimeError):
                assert self._loop is not None
                self._loop.call_soon_threadsafe(on_loop, arguments)

        return on_network_thread

    def _connected(self, flags: Any, code: ReasonCode, properties: Any) -> None:
        if code.is_failure:
            self._telemetry.emit(CONNECT_FAILED, broker=self._address, detail=code.getName())
            self._down.set()
            return
        if self._had_session and not flags.session_present:
            self._telemetry.emit(SESSION_LOST, broker=self._address)
        self._had_session = True
        # Properties that the broker did not send are not attributes of paho's object.
        self._inflight_limit = min(self._inflight_max, getattr(properties, "ReceiveMaximum", self._inflight_max))
        self._packet_limit = getattr(properties, "MaximumPacketSize", None)
        if self._subscriptions and self._client is not None:
            # 1: retained messages only when the subscription is new, not on every reconnect.
            options = SubscribeOptions(qos=1, retainHandling=1)
            self._client.subscribe([(topic, options) for topic in self._subscriptions])
        else:
            self._ready()

    def _subscribed(self, _mid: int, codes: list[ReasonCode], _properties: Any) -> None:
        refused = [code.getName() for code in codes if code.is_failure]
        if refused:
            detail = f"{', '.join(refused)}; check the broker's ACL for {', '.join(self._subscriptions)}"
            self._telemetry.emit(SUBSCRIBE_REFUSED, count=len(refused), broker=self._address, detail=detail)
            self._down.set()
            return
        self._ready()

    def _ready(self) -> None:
        self._up.set()
        self._telemetry.emit(CONNECTED, broker=self._address, client_id=self._client_id)
        self._on_connection(True)

    def _disconnected(self, _flags: Any, code: ReasonCode, _properties: Any) -> None:
        if not self._stopping.is_set() and not self._down.is_set():
            event = DISCONNECTED if self._up.is_set() else CONNECT_FAILED
            self._telemetry.emit(event, broker=self._address, detail=code.getName())
        self._down.set()

    def _published(self, mid: int, code: ReasonCode, _properties: Any) -> None:
        future = self._pending.get(mid)
        if future is not None and not future.done():
            future.set_result(int(code.value))

    def _received(self, message: paho.MQTTMessage) -> None:
        received = Message(message.topic, bytes(message.payload), message.retain, message.mid, message.qos, self.epoch)
        try:
            self._on_message(received)
        except Exception as error:  # noqa: BLE001 - one message must not end the session
            self._telemetry.emit(CALLBACK_FAILED, topic=message.topic, detail=repr(error))

    def _fail_pending(self, why: str) -> None:
        for future in self._pending.values():
            if not future.done():
                future.set_exception(Retryable(f"MQTT broker at {self._address}: {why}"))
        self._pending.clear()


async def _close(client: paho.Client) -> None:
    """Disconnects and ends the network thread, which would wait for a hung network until the keep-alive."""
    client.disconnect()
    stopping = asyncio.ensure_future(asyncio.to_thread(client.loop_stop))
    try:
        await asyncio.wait_for(asyncio.shield(stopping), _CLOSE_TIMEOUT_S)
    except TimeoutError:
        connection = client.socket()
        if isinstance(connection, socket.socket):  # TLS sockets included
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        await stopping
