"""What the devices say of themselves, on its way to Kafka.

The ledger learns from it how many records a spool has accepted, so it must not lie: a status is built field by field
from what was checked, and names the device on whose topic it came. Only the newest one of a device is of interest: one
that waits is superseded by the next.

A status that is refused is counted and dropped; it is no record.
"""

import asyncio
import contextlib
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from google.protobuf.message import DecodeError

from gateway.path_config import StatusConfig
from gateway.ring import Ring, Slot
from protos import control_pb2
from sluice import topics
from sluice.connections import MqttConfig
from sluice.errors import Permanent, SluiceError
from sluice.kafka import KafkaWriter
from sluice.ledger import status_order
from sluice.mqtt import Message, MqttSession
from sluice.record import SEQUENCE_MAX, SPOOL_ID_BYTES
from sluice.service import until_one_ends
from sluice.telemetry import Event, Telemetry

REFUSED = Event(
    name="status_refused", unit="messages", help="Status messages that break a rule, and were dropped.", level="warning"
)
NOT_RELAYED = Event(
    name="status_not_relayed",
    unit="messages",
    help="Status messages that did not reach Kafka; the device's next one replaces them.",
    level="warning",
)

# A version goes to the cloud: nothing that could be a sentence.
_VERSION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,31}\Z")


def checked(payload: bytes, origin: topics.Topic, config: StatusConfig, received_time_us: int) -> control_pb2.Status:
    """The status to pass on: known fields only, each checked. Pure.

    Raises:
        Permanent: naming the rule that it breaks; never quoting it.
    """
    if len(payload) > config.bytes_max:
        raise Permanent(f"{len(payload)} bytes, status.bytes_max is {config.bytes_max}")
    try:
        told = control_pb2.Status.FromString(payload)
    except DecodeError as error:
        raise Permanent("not a Status message") from error
    if told.device_id != origin.device or told.site != origin.site:
        raise Permanent("names another device or site than its topic")
    if len(told.spool_id) != SPOOL_ID_BYTES:
        raise Permanent(f"spool_id has {len(told.spool_id)} bytes instead of {SPOOL_ID_BYTES}")
    if told.next_sequence > SEQUENCE_MAX:
        raise Permanent("next_sequence is beyond 63 bits")
    if len(told.spool_ranges) > config.ranges_max:
        raise Permanent(f"{len(told.spool_ranges)} ranges, status.ranges_max is {config.ranges_max}")
    if any(run.last < run.first or run.last >= told.next_sequence for run in told.spool_ranges):
        raise Permanent("a range lies outside the sequences of its spool")
    return control_pb2.Status(
        device_id=told.device_id,
        site=told.site,
        spool_id=told.spool_id,
        next_sequence=told.next_sequence,
        spool_records=told.spool_records,
        spool_bytes=told.spool_bytes,
        spool_oldest_time_us=told.spool_oldest_time_us,
        agent_version=told.agent_version if _VERSION.match(told.agent_version) else "",
        uptime_s=told.uptime_s if math.isfinite(told.uptime_s) else 0.0,
        status_time_us=told.status_time_us,
        online=told.online,
        expired_records=told.expired_records,
        received_time_us=received_time_us,
        spool_ranges=[control_pb2.SequenceRange(first=run.first, last=run.last) for run in told.spool_ranges],
    )


def newest(old: control_pb2.Status, new: control_pb2.Status) -> control_pb2.Status:
    """What to pass on of two: a last-will says that the device is gone, with numbers from when it came. Pure."""
    if new.spool_id != old.spool_id or _order(new) >= _order(old):
        return new
    old.online = new.online
    return old


def _order(status: control_pb2.Status) -> tuple[int, int]:
    return status_order(status.next_sequence, status.spool_records)


@dataclass(slots=True)
class _Waiting:
    """The newest status of a device, not in Kafka yet."""

    status: control_pb2.Status
    slot: Slot[Message]


class StatusRelay:
    """The service that passes status messages on. It has an MQTT session of its own, so that it never delays records.

    Args:
        config: limits.
        mqtt: how to reach the broker.
        client_id: of the session.
        site: ours.
        writer: to Kafka.
        topic: Kafka's, keyed by device.
        telemetry: for events.
        now_us: UTC microseconds.
    """

    name = "status"

    def __init__(
        self,
        config: StatusConfig,
        mqtt: MqttConfig,
        client_id: str,
        site: str,
        writer: KafkaWriter,
        topic: str,
        telemetry: Telemetry,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._config = config
        self._writer = writer
        self._topic = topic
        self._telemetry = telemetry
        self._now_us = now_us
        self._ring: Ring[Message] = Ring()
        self._waiting: dict[str, _Waiting] = {}
        self._some = asyncio.Event()
        self._relayed = telemetry.counter("status_relayed", "Status messages passed on.")
        self._passing = 0
        self._passed = asyncio.Event()
        self._session = MqttSession(
            mqtt,
            client_id=client_id,
            telemetry=telemetry,
            subscriptions=[topics.topic(site, "+", topics.STATUS)],
            on_message=self._receive,
            on_connection=self._connection_changed,
            manual_ack=True,
        )

    @property
    def connected(self) -> bool:
        """Whether status messages can come; thread-safe."""
        return self._session.connected

    async def run(self) -> None:
        """Relays until drained."""
        await until_one_ends(self._session.run(), self._relay())

    async def drain(self, deadline_s: float) -> None:
        """Gives what has come a quarter of the time to reach Kafka, and disconnects.

        What has not reached it was not acknowledged, and the broker delivers it again.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s / 4):
                while self._passing or self._waiting:
                    self._passed.clear()
                    await self._passed.wait()
        await self._session.stop()

    def _receive(self, message: Message) -> None:
        # The order is that of PUBACKs; a message without one (QoS 0) must not lengthen it. Nor is its payload kept.
        bare = replace(message, payload=b"")
        slot = self._ring.add(bare) if message.qos else Slot(bare)
        try:
            self._accept(message, slot)
        except Permanent as error:
            # An empty payload clears a retained status: nothing to say.
            if message.payload:
                self._telemetry.emit(REFUSED, bytes=len(message.payload), detail=str(error)[:200])
            self._finish(slot)

    def _accept(self, message: Message, slot: Slot[Message]) -> None:
        try:
            origin = topics.parse(message.topic)
        except Permanent:
            # Its text quotes the topic, which is of the device's making.
            raise Permanent("its topic does not name a device") from None
        status = checked(message.payload, origin, self._config, self._now_us())
        superseded = self._waiting.get(origin.device)
        if superseded is None and len(self._waiting) >= self._config.devices_max:
            raise Permanent(f"status.devices_max = {self._config.devices_max} devices wait already")
        if superseded is not None:
            status = newest(superseded.status, status)
            self._finish(superseded.slot)
        self._waiting[origin.device] = _Waiting(status, slot)
        self._some.set()

    def _connection_changed(self, up: bool) -> None:
        if not up:
            self._ring.clear()

    async def _relay(self) -> None:
        while True:
            await self._some.wait()
            self._some.clear()
            waiting, self._waiting = self._waiting, {}
            self._passing = len(waiting)
            await asyncio.gather(*(self._pass(device, entry) for device, entry in waiting.items()))

    async def _pass(self, device: str, entry: _Waiting) -> None:
        headers: dict[str, str | bytes] = {"site": entry.status.site, "device": device}
        try:
            await self._writer.write(self._topic, device, entry.status.SerializeToString(), headers)
        except SluiceError as error:
            self._telemetry.emit(NOT_RELAYED, device=device, detail=str(error))
        else:
            self._relayed.inc()
        self._finish(entry.slot)
        self._passing -= 1
        self._passed.set()

    def _finish(self, slot: Slot[Message]) -> None:
        for message in self._ring.finish(slot):
            self._session.ack(message)
