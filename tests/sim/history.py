"""One history: a seed decides what the world does to two devices, a gateway and a lake; then the promises are checked.

After every history: (1) every accepted record has one fate, by the ledger's own judgement, and what is in the lake or
kept on the site is what was accepted; (2) no canary is in any byte that left the site; (3) no row is there twice;
(4) nothing grew beyond its limit, and the history came to an end.
"""

from collections.abc import Callable
from typing import NamedTuple

import zstandard

from protos import record_pb2
from sluice.ledger import FATE_OF_GAP, Fate, SpoolEvidence, balance
from sluice.record import Record
from tests.sim.bugs import Bug
from tests.sim.device import CANARY, OBSERVATION, SPOOL_ITEMS_BOUND, Device
from tests.sim.fake_delta import FakeDelta
from tests.sim.fake_kafka import FakeKafka
from tests.sim.fake_mqtt import QUEUE_MESSAGES_MAX, FakeMqtt
from tests.sim.gateway import IN_FLIGHT_MAX, Gateway
from tests.sim.lake import Lake, Tables
from tests.sim.world import Crash, World

RECORDS_PER_DEVICE = 30
PARTITIONS = 2
STORM_STEPS = 250
CALM_STEPS_MAX = 20_000


class Broken(AssertionError):
    """A promise did not hold."""


class Outcome(NamedTuple):
    """What a history was like."""

    steps: int
    records: int


class History:
    """The actors of one seed.

    Args:
        seed: decides everything.
        bug: to be found.
    """

    def __init__(self, seed: int, bug: Bug | None = None) -> None:
        self.world = world = World(seed)
        self._bug = bug
        self._steps = 0
        self._broker = FakeMqtt(world, receive_max=8)
        self._kafka = FakeKafka(PARTITIONS, world)
        self._tables = Tables(FakeDelta(world), FakeDelta(world))
        self._gateway = Gateway(world, self._broker, self._kafka, bug)
        self._devices = [Device(world, self._broker, f"device-{n}", RECORDS_PER_DEVICE, bug) for n in range(2)]
        self._lakes = [Lake(world, self._kafka, n, self._tables, bug) for n in range(PARTITIONS)]
        self._zombies: list[Lake] = []

    def run(self) -> Outcome:
        """Storm, then calm, then judgement.

        Raises:
            Broken: naming the promise.
        """
        for _ in range(STORM_STEPS):
            self._step()
        self.world.calm()
        self._gateway.start()  # in the calm nobody waits for what a storm swallowed
        for device in self._devices:
            device.start()
        while not self._idle:
            self._step()
            if self._steps > CALM_STEPS_MAX:
                raise Broken("it does not come to an end")
        self._judge()
        return Outcome(self._steps, sum(len(device.accepted) for device in self._devices))

    @property
    def _idle(self) -> bool:
        actors = [*self._devices, self._gateway, *self._lakes]
        return all(actor.idle for actor in actors) and not self._broker.queued_messages

    def _step(self) -> None:
        self._steps += 1
        world, gateway = self.world, self._gateway
        world.tick()
        device = world.rng.choice(self._devices)
        lake = world.rng.choice([*self._lakes, *self._zombies])
        actor, action = world.rng.choice(self._choices(device, gateway, lake))
        try:
            action()
        except Crash:
            actor.start()
        if world.chance(world.faults.forget):
            self._forget()
        if world.chance(world.faults.rebalance):
            self._rebalance()
        self._check_bounds()

    def _choices(
        self, device: Device, gateway: Gateway, lake: Lake
    ) -> list[tuple[Device | Gateway | Lake, Callable[[], None]]]:
        return [
            *((device, action) for action in (device.accept, device.send, device.listen, device.trouble)),
            *((gateway, action) for action in (gateway.receive, gateway.classify, gateway.produce, gateway.tell)),
            (gateway, gateway.trouble),
            (lake, lake.read),
            (lake, lake.flush),
        ]

    def _forget(self) -> None:
        """The broker restarts with nothing; all clients come back."""
        self._broker.forget()
        self._gateway._connect()
        for device in self._devices:
            device._connect()

    def _rebalance(self) -> None:
        """A partition gets a new owner; the old one has not heard of it."""
        partition = self.world.rng.randrange(PARTITIONS)
        self._zombies = [*self._zombies, self._lakes[partition]][-2:]
        self._lakes[partition] = Lake(self.world, self._kafka, partition, self._tables, self._bug)

    def _check_bounds(self) -> None:
        for device in self._devices:
            if device.spool_items > SPOOL_ITEMS_BOUND:
                raise Broken("a spool grew beyond its limit")
        if self._gateway.in_flight > IN_FLIGHT_MAX:
            raise Broken("the gateway took more than its limit")
        if self._broker.queued_messages > 4 * QUEUE_MESSAGES_MAX:
            raise Broken("the broker's queues grew beyond their limits")

    def _judge(self) -> None:
        for device in self._devices:
            observed = [int(record.labels[OBSERVATION]) for _, record in sorted(device.accepted.items())]
            if observed != list(range(RECORDS_PER_DEVICE)):
                raise Broken(f"{device.name} lost or repeated observations on the way into its spool")
            self._judge_spool(device)
        exported = [entry.value for partition in self._kafka.partitions for entry in partition]
        exported += [_body(value) for value in exported]
        exported += [row.frame for row in self._tables.records.rows]
        if any(CANARY.encode() in content for content in exported):
            raise Broken("a canary left the site")

    def _judge_spool(self, device: Device) -> None:
        spool = (device.name, device.spool_id)
        evidence = SpoolEvidence(*spool, next_sequence=device.next_sequence)
        rows = [row for row in self._tables.records.rows if row.spool == spool]
        evidence.lake_rows = len(rows)
        for row in rows:
            evidence.add(Fate.IN_LAKE, row.sequence, row.sequence + 1)
        for gap in self._tables.ledger.rows:
            if gap.spool == spool:
                evidence.add(FATE_OF_GAP[gap.reason], gap.start, gap.stop)
        for start, stop in device.spool_ranges.runs():
            evidence.add(Fate.IN_SPOOL, start, stop)
        account = balance(evidence)
        if not account.balanced:
            wrong: dict[str, object] = {"unexplained": account.unexplained, "conflicting": account.conflicting}
            wrong["duplicate_rows"] = account.duplicate_rows
            said = ", ".join(f"{name} {what}" for name, what in wrong.items() if what)
            raise Broken(f"the ledger of {device.name} does not balance: {said}")
        for row in rows:
            if _record(row.frame) != device.accepted[row.sequence]:
                raise Broken(f"{device.name}/{row.sequence} is not in the lake as it was accepted")
        self._judge_site(device, evidence)

    def _judge_site(self, device: Device, evidence: SpoolEvidence) -> None:
        kept = self._gateway.site.kept
        for start, stop in evidence.fates[Fate.KEPT_ON_SITE].runs() if Fate.KEPT_ON_SITE in evidence.fates else []:
            for sequence in range(start, stop):
                frame = kept.get((device.name, device.spool_id, sequence))
                if frame is None or _record(frame) != device.accepted[sequence]:
                    raise Broken(f"{device.name}/{sequence} is not kept on the site as it was accepted")
        for start, stop in evidence.fates[Fate.EXPIRED].runs() if Fate.EXPIRED in evidence.fates else []:
            if not device.expired.covers(start, stop):
                raise Broken(f"{device.name}/{start} never expired")


def _record(frame: bytes) -> Record:
    return Record.from_message(record_pb2.Record.FromString(frame))


def _body(payload: bytes) -> bytes:
    """What a look into the compressed records would show, unknown fields included."""
    envelope = record_pb2.Envelope.FromString(payload)
    if not envelope.batch or envelope.compression == record_pb2.COMPRESSION_NONE:
        return envelope.batch
    return zstandard.ZstdDecompressor().decompress(envelope.batch)
