"""The inbox: envelopes from devices, as deliveries.

Invariants:
  * PUBACKs go out in the order of receipt, each when its message has been dealt with; the application acknowledgement
    goes out when a delivery is acked, that is when its records are durable where they had to go. A nack sends none: the
    device resends.
  * What came on a connection that is gone is void: its PUBACKs are not sent, and the broker delivers again.
  * Bounded: at most `window_messages_max` envelopes are worked on, `decoded_bytes_max` of what is decoded is not
    settled, and `held_messages_max` and `held_bytes_max` of what has come are in hand. A broker should respect our
    ReceiveMaximum, which is the window, and not all do (Mosquitto 2.0.11 sends on after the first PUBACK, rumqttd never
    looks at it): so what is in hand may be more than the window. What is above even that is put aside without its
    bytes, and its PUBACK waits for room, so the broker's own limit slows it down. The device resends it.
  * A resend is answered from memory (`seen`), and is not forwarded twice.

Bad input never ends anything here: it becomes a `Refusal` for the quarantine (see there for what is settled).
"""

import asyncio
import contextlib
import hashlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace

from gateway.acks import Acks
from gateway.path_config import InboxConfig
from gateway.quarantine import Refusal
from gateway.ring import Ring, Slot
from gateway.seen import Arrival, Seen
from sluice import codec, topics
from sluice.codec import Limits, Rejected, RejectReason
from sluice.connections import MqttConfig
from sluice.delivery import Delivery
from sluice.errors import Permanent, SluiceError
from sluice.mqtt import Message, MqttSession
from sluice.record import RecordBatch
from sluice.service import until_one_ends
from sluice.telemetry import Event, Telemetry

RESENT = Event(
    name="envelope_resent",
    unit="envelopes",
    help="Envelopes recognised as resends and not forwarded again.",
    labels=("state",),
    level="debug",
)
NACKED = Event(
    name="envelope_nacked",
    unit="envelopes",
    help="Envelopes not acknowledged; their devices resend them.",
    labels=("kind",),
    level="warning",
)
SHED = Event(
    name="inbox_shed",
    unit="messages",
    help="Messages put aside because the broker sent more than we may hold; their devices resend them.",
    level="warning",
)
IDENTITY_REUSED = Event(
    name="spool_identity_reused",
    unit="envelopes",
    help="Envelopes whose identity was used before with other content: two devices run one spool. Look at them.",
    labels=("site",),
    level="error",
)


@dataclass(eq=False, slots=True)
class _Held:
    """A message in our hands. `size_bytes` counts against the window until it is let go."""

    message: Message
    slot: Slot[Message]
    size_bytes: int
    decoded_bytes: int = 0


class Inbox:
    """A source of `Delivery[RecordBatch]`, and a service.

    Args:
        config: limits.
        mqtt: how to reach the broker.
        limits: of one envelope.
        site: ours; envelopes of others are refused.
        telemetry: for events.
        refuse: deals with bad input; what it raises leaves the input unsettled.
        now_us: UTC microseconds.
    """

    name = "inbox"

    def __init__(
        self,
        config: InboxConfig,
        mqtt: MqttConfig,
        limits: Limits,
        site: str,
        telemetry: Telemetry,
        refuse: Callable[[Refusal], Awaitable[None]],
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._config = config
        self._limits = limits
        self._site = site
        self._telemetry = telemetry
        self._refuse = refuse
        self._now_us = now_us
        self.client_id = config.client_id or f"sluice-gateway-{site}"
        self._session = MqttSession(
            mqtt,
            client_id=self.client_id,
            telemetry=telemetry,
            subscriptions=[topics.topic(site, "+", topics.UP)],
            on_message=self._receive,
            on_connection=self._connection_changed,
            manual_ack=True,
            receive_max=config.window_messages_max,
            packet_bytes_max=config.packet_bytes_max,
        )
        self._seen = Seen(
            spools_max=config.spools_max,
            runs_per_spool_max=config.runs_per_spool_max,
            envelopes_max=config.envelopes_max,
        )
        self._acks = Acks(
            site,
            self._session.publish,
            self._seen.cumulative,
            telemetry,
            delay_s=config.ack_delay_ms / 1000,
            spools_max=config.spools_max,
        )
        self._ring: Ring[Message] = Ring()
        self._waiting: deque[_Held] = deque()
        self._shed: deque[Slot[Message]] = deque()
        self._held: set[_Held] = set()
        self._held_bytes = 0
        self._decoded_bytes = 0
        self._changed = asyncio.Event()
        self._draining = asyncio.Event()
        self._refusals: set[asyncio.Task[None]] = set()
        self._received = telemetry.counter("inbox_records", "Records received, resends not counted.")
        telemetry.gauge("inbox_held_messages", "Messages in hand.").set_function(lambda: len(self._held))

    @property
    def connected(self) -> bool:
        """Whether envelopes can come; thread-safe."""
        return self._session.connected

    @property
    def held(self) -> int:
        """Messages in hand: received and not dealt with."""
        return len(self._held)

    async def run(self) -> None:
        """Receives and acknowledges until drained."""
        try:
            await until_one_ends(self._session.run(), self._acks.run(self._session.wait_connected))
        finally:
            for task in self._refusals:
                task.cancel()
            await asyncio.gather(*self._refusals, return_exceptions=True)

    async def drain(self, deadline_s: float) -> None:
        """Takes no more, gives what is under way half of the time to settle, acknowledges, and disconnects.

        What is not settled then is not acknowledged: the broker and the devices have it still.
        """
        self._draining.set()
        self._changed.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s / 2):
                while self._held:
                    self._changed.clear()
                    await self._changed.wait()
        if self._session.connected:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(deadline_s / 4):
                    await self._acks.flush()
        await self._session.stop()

    async def deliveries(self) -> AsyncIterator[Delivery[RecordBatch]]:
        """Deliveries in the order of receipt; ends when drained. Each must be settled, on this loop."""
        while (held := await self._next()) is not None:
            delivery = await self._admit(held)
            if delivery is not None:
                yield delivery

    async def _next(self) -> _Held | None:
        """The next message, when there is room to decode it; None when drained."""
        while not self._draining.is_set():
            if self._waiting and self._has_room_to_decode():
                return self._waiting.popleft()
            self._changed.clear()
            await self._changed.wait()
        self._forget_waiting()
        return None

    def _has_room_to_decode(self) -> bool:
        if len(self._held) - len(self._waiting) >= self._config.window_messages_max:
            return False
        used = self._decoded_bytes
        return not used or used + self._limits.decompressed_bytes_max <= self._config.decoded_bytes_max

    def _forget_waiting(self) -> None:
        """Drops what nobody has begun with; the broker and the devices have it still."""
        for held in self._waiting:
            self._drop(held)
        self._waiting.clear()
        self._changed.set()

    def _receive(self, message: Message) -> None:
        """Called by the session for every message: takes it in, or puts it aside."""
        if self._draining.is_set():
            return
        # Without a PUBACK (QoS 0) nothing slows the broker down: such a message takes no place in the order, and one
        # without room is not noted at all.
        slot = self._ring.add(message) if message.qos else Slot(message)
        held = _Held(message, slot, len(message.payload))
        if not self._has_room_for(held.size_bytes):
            self._telemetry.emit(SHED, bytes=held.size_bytes)
            if not message.qos:
                return
            slot.item = replace(message, payload=b"")
            self._shed.append(slot)
            return
        self._held.add(held)
        self._held_bytes += held.size_bytes
        self._waiting.append(held)
        self._changed.set()

    def _has_room_for(self, size_bytes: int) -> bool:
        if not self._held:
            return True
        fits = self._held_bytes + size_bytes <= self._config.held_bytes_max
        return fits and len(self._held) < self._config.held_messages_max

    def _connection_changed(self, up: bool) -> None:
        if not up:
            self._ring.clear()
            self._shed.clear()
            self._forget_waiting()

    async def _admit(self, held: _Held) -> Delivery[RecordBatch] | None:
        """Decodes and checks; None when it was a resend or was refused."""
        try:
            batch, checksum = await asyncio.to_thread(self._decode, held.message)
        except Rejected as rejected:
            self._reject(held, rejected)
            return None
        arrival = self._seen.admit(batch, checksum)
        if arrival is Arrival.REUSED:
            self._telemetry.emit(IDENTITY_REUSED, site=self._site, device=batch.device_id, spool=batch.spool_id.hex())
            detail = f"sequence {batch.first_sequence} (+{batch.record_count}) was used before with other content"
            self._reject(held, Rejected(RejectReason.IDENTITY_REUSED, detail))
            return None
        if arrival is not Arrival.NEW:
            self._resent(held, batch, arrival)
            return None
        held.decoded_bytes = len(batch.data)
        self._decoded_bytes += held.decoded_bytes
        self._received.inc(batch.present_count)
        return Delivery(batch, lambda error: self._settled(held, batch, error))

    def _decode(self, message: Message) -> tuple[RecordBatch, bytes]:
        """The batch and its records' checksum. Runs in a thread."""
        device = self._device_of(message)
        batch = codec.decode(message.payload, self._limits)
        self._check_names(batch, device)
        batch = replace(batch, received_time_us=self._now_us())
        return batch, _checksum(batch.data)

    def _device_of(self, message: Message) -> str:
        try:
            return topics.parse(message.topic).device
        except Permanent as error:
            raise Rejected(RejectReason.DEVICE_NAME, str(error)) from error

    def _check_names(self, batch: RecordBatch, device: str) -> None:
        """The topic is guarded by the broker's ACL; what the envelope says of itself must agree with it."""
        if batch.device_id != device:
            raise Rejected(RejectReason.DEVICE_NAME, f"names device {batch.device_id}, came on the topic of {device}")
        if batch.site != self._site:
            raise Rejected(RejectReason.HEADER, f"names site {batch.site}, came on a topic of {self._site}")

    def _reject(self, held: _Held, rejected: Rejected) -> None:
        """Gives a message to the quarantine, as a task: its way leads over Kafka, and others need not wait for it."""
        claim = self._trusted_claim(held.message, rejected)
        if claim is not None:
            # Nothing of a refused envelope is known but its range: the checksum of no records.
            arrival = self._seen.admit(claim, _checksum(b""))
            if arrival is not Arrival.NEW:
                self._resent(held, claim, arrival)
                return
        try:
            device = self._device_of(held.message)
        except Rejected:
            device = ""
        refusal = Refusal(
            site=self._site,
            device_id=device,
            payload=held.message.payload,
            reason=rejected.reason,
            detail=rejected.detail,
            received_time_us=self._now_us(),
            claim=claim,
        )
        delivery = Delivery(refusal, lambda error: self._settled(held, claim, error))
        task = asyncio.create_task(self._pass_refusal(delivery), name="refusal")
        self._refusals.add(task)
        task.add_done_callback(self._refusals.discard)

    async def _pass_refusal(self, delivery: Delivery[Refusal]) -> None:
        async with delivery:
            await self._refuse(delivery.batch)

    def _trusted_claim(self, message: Message, rejected: Rejected) -> RecordBatch | None:
        """The range that a refused envelope claims, if it names the device and site that it came from."""
        claim = rejected.header
        try:
            if rejected.reason is RejectReason.ENVELOPE_BYTES:
                # Too large for us to process, but small enough to be here: its header may still be read.
                claim = codec.claimed_range(message.payload, self._limits, self._config.packet_bytes_max)
            if claim is None:
                return None
            self._check_names(claim, self._device_of(message))
        except Rejected:
            return None
        return replace(claim, received_time_us=self._now_us())

    def _resent(self, held: _Held, batch: RecordBatch, arrival: Arrival) -> None:
        self._telemetry.emit(RESENT, state=arrival.value, device=batch.device_id)
        if arrival is Arrival.SETTLED:
            self._acks.add(batch)
        self._let_go(held, acknowledge=True)

    def _settled(self, held: _Held, batch: RecordBatch | None, error: Exception | None) -> None:
        """A delivery's end: `batch` is what its acknowledgement covers, None when it covers nothing."""
        if error is not None:
            kind = type(error).__name__ if isinstance(error, SluiceError) else "unexpected"
            self._telemetry.emit(NACKED, kind=kind, detail=type(error).__name__)
        if batch is not None and error is None:
            self._seen.settle(batch)
            self._acks.add(batch)
        elif batch is not None:
            self._seen.release(batch)
        self._let_go(held, acknowledge=not self._draining.is_set() or error is None)

    def _let_go(self, held: _Held, *, acknowledge: bool) -> None:
        """Frees what a message holds, and sends the PUBACKs that have become due."""
        self._drop(held)
        if acknowledge:
            self._puback(held.slot)
            while self._shed and self._has_room_for(self._config.packet_bytes_max):
                self._puback(self._shed.popleft())
        self._changed.set()

    def _drop(self, held: _Held) -> None:
        self._held.remove(held)
        self._held_bytes -= held.size_bytes
        self._decoded_bytes -= held.decoded_bytes

    def _puback(self, slot: Slot[Message]) -> None:
        for message in self._ring.finish(slot):
            self._session.ack(message)


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()
