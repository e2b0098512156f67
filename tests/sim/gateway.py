"""The gateway: the real codec, memory of resends, router and ring of acknowledgements; one step at a time.

A message passes through `receive` -> `classify` (local part durable) -> `produce` (Kafka has it) -> `tell` (app-ack),
and between any two of them the process may die.
"""

import hashlib
from dataclasses import dataclass, field

from gateway.batches import Decision, ExportBatch, Verdict
from gateway.ring import Ring, Slot
from gateway.router import IN_DOUBT, route
from gateway.seen import Arrival, Seen
from sluice import topics
from sluice.acks import encode_ack
from sluice.codec import Limits, Rejected, decode, encode
from sluice.errors import Retryable
from sluice.record import RecordBatch, Route
from tests.sim.bugs import Bug
from tests.sim.device import CANARY, SITE
from tests.sim.fake_kafka import FakeKafka
from tests.sim.fake_mqtt import Delivered, FakeMqtt
from tests.sim.world import World

NAME = "gateway"
IN_FLIGHT_MAX = 6
CLOUD = Decision(Route.CLOUD, "default")
LOCAL = Decision(Route.LOCAL, "card", ("card",))


@dataclass
class Site:
    """What is durable on the site.

    Attributes:
        kept: frames that stay, by (device, spool, sequence).
        quarantine: original bytes, with the reason.
    """

    kept: dict[tuple[str, bytes, int], bytes] = field(default_factory=dict)
    quarantine: list[tuple[str, bytes]] = field(default_factory=list)


@dataclass
class _Work:
    """A message on its way through the gateway."""

    slot: Slot[int]
    batch: RecordBatch
    original: bytes
    admitted: bool
    payload: bytes | None = None
    after: list[tuple[tuple[str, bytes, int], bytes]] = field(default_factory=list)


class Gateway:
    """See the module's docstring."""

    def __init__(self, world: World, broker: FakeMqtt, kafka: FakeKafka, bug: Bug | None) -> None:
        self.site = Site()
        self._world = world
        self._broker = broker
        self._kafka = kafka
        self._bug = bug
        self.start()

    def start(self) -> None:
        """The process starts (again): memory is empty."""
        self._seen = Seen(spools_max=2, runs_per_spool_max=4, envelopes_max=20)
        self._work: list[_Work] = []
        self._tell: list[RecordBatch] = []
        self._connect()

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way here."""
        return not self._work and not self._tell

    @property
    def in_flight(self) -> int:
        """Messages on their way."""
        return len(self._work)

    def receive(self) -> None:
        """Takes the next message and admits it."""
        if len(self._work) >= IN_FLIGHT_MAX:
            return
        message = self._broker.receive(NAME)
        if message is None:
            return
        slot = self._ring.add(message.mid)
        try:
            batch = decode(message.payload, Limits())
        except Rejected as error:
            self._quarantine(message, slot, error.reason.value, error.header)
        else:
            self._admit(batch, message, slot)

    def classify(self) -> None:
        """Decides on a batch, in any order, and makes durable what stays."""
        waiting = [work for work in self._work if work.payload is None]
        if not waiting:
            return
        work = self._world.rng.choice(waiting)
        parts = route(work.batch, self._verdict(work.batch))
        export = parts.export
        if parts.local is not None:
            keys = [(work.batch.device_id, work.batch.spool_id, each) for each in parts.local.sequences]
            kept = list(zip(keys, parts.local.frames, strict=True))
            if self._bug is Bug.LOCAL_AFTER_RECEIPT:
                work.after = kept
            else:
                self.site.kept.update(kept)
        self._world.crash_point()
        work.payload = self._exported(work, export)

    def produce(self) -> None:
        """Sends one to Kafka, in any order, and settles it when Kafka has it."""
        ready = [work for work in self._work if work.payload is not None]
        if not ready:
            return
        work = self._world.rng.choice(ready)
        if self._bug is Bug.SETTLE_BEFORE_DURABLE:
            self._tell.append(work.batch)
        self._world.crash_point()
        try:
            if work.payload:
                self._kafka.produce(work.batch.device_id.encode(), work.payload)
        except Retryable:
            return  # tried again, with the same bytes
        self._world.crash_point()
        self.site.kept.update(work.after)
        self._settle(work)

    def tell(self) -> None:
        """Publishes an application acknowledgement."""
        if not self._tell:
            return
        batch = self._tell.pop(self._world.rng.randrange(len(self._tell)))
        cumulative = self._seen.cumulative(batch.device_id, batch.spool_id)
        if self._bug is Bug.CUMULATIVE_IS_THE_HIGHEST:
            cumulative = max(cumulative, batch.stop_sequence)
        ack = encode_ack(batch.spool_id, cumulative, [(batch.first_sequence, batch.stop_sequence)])
        self._broker.publish(topics.topic(SITE, batch.device_id, topics.ACK), ack)
        self._world.crash_point()

    def trouble(self) -> None:
        """The connection ends: what was not acknowledged comes again, and old message ids mean nothing."""
        if self._world.chance(self._world.faults.disconnect):
            self._connect()

    def _connect(self) -> None:
        self._ring: Ring[int] = Ring()
        self._broker.connect(NAME)
        self._broker.subscribe(NAME, f"{topics.ROOT}/{SITE}/+/{topics.UP}")

    def _admit(self, batch: RecordBatch, message: Delivered, slot: Slot[int]) -> None:
        match self._seen.admit(batch, hashlib.blake2b(message.payload).digest()):
            case Arrival.NEW:
                self._work.append(_Work(slot, batch, message.payload, admitted=True))
            case Arrival.SETTLED:
                self._tell.append(batch)
                self._finish(slot)
            case Arrival.IN_FLIGHT:
                if self._bug is Bug.RESENDS_IN_FLIGHT_ARE_SETTLED:
                    self._tell.append(batch)
                self._finish(slot)
            case Arrival.REUSED:
                self._quarantine(message, slot, "identity_reused", None)

    def _quarantine(self, message: Delivered, slot: Slot[int], reason: str, header: RecordBatch | None) -> None:
        """The bytes stay on the site; the range, where it can be trusted, is declared as any other."""
        self.site.quarantine.append((reason, message.payload))
        if header is None or topics.parse(message.topic).device != header.device_id:
            self._finish(slot)
            return
        if self._seen.admit(header, message.payload) is Arrival.NEW:
            payload = encode(ExportBatch.of(header, {}).to_record_batch()).payload
            self._work.append(_Work(slot, header, message.payload, admitted=True, payload=payload))
        else:
            self._finish(slot)

    def _verdict(self, batch: RecordBatch) -> Verdict:
        """The scanner's: exact here, but it fails now and then, and then everything stays."""
        if self._world.chance(0.05):
            return Verdict(CLOUD) if self._bug is Bug.DOUBT_GOES_TO_THE_CLOUD else IN_DOUBT
        found = {index: LOCAL for index, frame in enumerate(batch.frames()) if CANARY.encode() in frame}
        return Verdict(CLOUD, found)

    def _exported(self, work: _Work, export: ExportBatch) -> bytes:
        batch = export.to_record_batch()
        if self._bug is Bug.NO_RECEIPT and not batch.present_count:
            return b""
        if self._bug is Bug.UNKNOWN_FIELDS_CROSS and batch.data == work.batch.data:
            return work.original
        return encode(batch).payload

    def _settle(self, work: _Work) -> None:
        self._work.remove(work)
        self._seen.settle(work.batch)
        if self._bug is not Bug.SETTLE_BEFORE_DURABLE:
            self._tell.append(work.batch)
        self._finish(work.slot)

    def _finish(self, slot: Slot[int]) -> None:
        for mid in self._ring.finish(slot):
            self._broker.acknowledge(NAME, mid)
