"""An agent: the real batcher, window and envelopes over a spool that is a dictionary: what is on disk survives a crash.

Its source is a log of numbered observations, read on from the place that the spool stored together with the records
before it. So the sequence of a record is the number of its observation, whatever happens in between.
"""

import random

from edge.batcher import Batch, Batcher, BatchLimits
from edge.records import BatchDraft, Chunk, StreamKey, declare_expired
from edge.window import Window, WindowLimits
from protos import record_pb2
from sluice import topics
from sluice.acks import decode_ack
from sluice.codec import Limits
from sluice.intervals import IntervalSet
from sluice.record import Record
from sluice.spool import SpoolItem
from tests.sim.bugs import Bug
from tests.sim.fake_mqtt import FakeMqtt
from tests.sim.world import World

SITE = "site-1"
CANARY = "4111-CANARY"
# The label that says which observation a record is.
OBSERVATION = "n"
WINDOW = WindowLimits(items_max=4, bytes_max=1 << 20, ack_timeout_s=5.0, ack_timeout_s_max=10.0)
# A batch closes for every reason now and then.
BATCHES = BatchLimits(bytes_target=200, bytes_max=300, records_max=6, age_s_max=1.0, commit_delay_s=0.1)
STREAM = StreamKey("log")
SPOOL_ITEMS_MAX = 6
# One transaction adds all batches that a chunk closes, and those that were due.
SPOOL_ITEMS_BOUND = SPOOL_ITEMS_MAX + 4
# Field 900 of the envelope, length-delimited: known to nobody.
_UNKNOWN_FIELD = b"\xa2\x38" + bytes([len(CANARY)]) + CANARY.encode()


class Device:
    """See the module's docstring.

    Attributes:
        accepted: every record that was ever accepted, by sequence: what the judge compares with.
        next_sequence: durable.
    """

    def __init__(self, world: World, broker: FakeMqtt, name: str, records_total: int, bug: Bug | None) -> None:
        self.name = name
        self.spool_id = world.rng.randbytes(16)
        self.accepted: dict[int, Record] = {}
        self.next_sequence = 0
        self._world = world
        self._broker = broker
        self._records_total = records_total
        self._bug = bug
        self._place = 0
        self._items: dict[int, SpoolItem] = {}
        self._next_key = 0
        self._settled = IntervalSet()
        self.expired = IntervalSet()
        self.start()

    def start(self) -> None:
        """The process starts (again): memory is empty."""
        self._window = Window(WINDOW, random.Random(self._world.rng.random()))
        self._batcher: Batcher[None] = Batcher(BATCHES)
        self._read_to = self._place
        self._connect()

    @property
    def idle(self) -> bool:
        """Whether everything was accepted and settled."""
        waiting = self._batcher.next_deadline_s() is not None or self._place < self._records_total
        return not waiting and not self._items

    @property
    def spool_ranges(self) -> IntervalSet:
        """What is in the spool."""
        return IntervalSet((item.first_sequence, item.stop_sequence) for item in self._items.values())

    @property
    def spool_items(self) -> int:
        """Its length."""
        return len(self._items)

    def accept(self) -> None:
        """The source delivers; what closes is stored with its place in one transaction, and counts from then on."""
        self._make_room()
        if len(self._items) >= SPOOL_ITEMS_MAX:
            return  # full: the source waits
        count = min(self._world.rng.randrange(1, 6), self._records_total - self._read_to)
        closed = self._batcher.due(self._now_s)
        if count > 0:
            closed += self._batcher.add(self._chunk(count), None, self._now_s)
        if self._read_to == self._records_total:
            closed += self._batcher.flush()
        self._world.crash_point()
        for batch in closed:
            self._store_batch(batch)
        self._world.crash_point()

    def send(self) -> None:
        """Fills the window and publishes what is due."""
        for key in sorted(self._items.keys() - self._window.keys)[: self._window.items_free]:
            self._window.add(self._items[key], self._now_s)
        for item in self._window.due(self._now_s, 3):
            self._window.sending(item.key, self._now_s)
            self._broker.publish(topics.topic(SITE, self.name, topics.UP), item.payload)
            self._window.sent(item.key)
            if self._bug is Bug.DELETE_ON_PUBACK:
                self._settle([(item.first_sequence, item.stop_sequence)])
            self._world.crash_point()

    def listen(self) -> None:
        """Takes one application acknowledgement."""
        message = self._broker.receive(self.name)
        if message is None:
            return
        self._broker.acknowledge(self.name, message.mid)
        ack = decode_ack(message.payload)
        if ack.spool_id == self.spool_id:
            runs = [(0, ack.cumulative_sequence), *((each.first, each.last + 1) for each in ack.ranges)]
            self._settle([(start, min(stop, self.next_sequence)) for start, stop in runs])

    def trouble(self) -> None:
        """The connection ends, or the broker has forgotten us."""
        if self._world.chance(self._world.faults.disconnect):
            self._connect()

    def _connect(self) -> None:
        self._broker.connect(self.name)
        self._broker.subscribe(self.name, topics.topic(SITE, self.name, topics.ACK))
        self._window.connection_lost(self._now_s)

    @property
    def _now_s(self) -> float:
        return self._world.time_us / 1e6

    def _observe(self, sequence: int) -> Record:
        secret = self._world.chance(0.15)
        text = f"{self.name}/{sequence}" + (f" card {CANARY}-{sequence}" if secret else "")
        return Record(self._world.time_us, text=text, labels={OBSERVATION: str(sequence)})

    def _chunk(self, count: int) -> Chunk:
        records = [self._observe(number) for number in range(self._read_to, self._read_to + count)]
        self._read_to += count
        if self._bug is Bug.PLACE_BEFORE_RECORDS:
            self._place = self._read_to
        frames = [record.to_message().SerializeToString() for record in records]
        place = {"log": b"%d" % self._read_to}
        return Chunk(STREAM, frames, self._world.time_us, place, urgent=self._world.chance(0.2))

    def _store_batch(self, batch: Batch[None]) -> None:
        first = self.next_sequence
        draft = BatchDraft(self.name, SITE, batch.key, batch.frames, batch.oldest_time_us)
        payload = draft.encode(self.spool_id, first)
        if self._world.chance(0.1):
            payload += _UNKNOWN_FIELD  # a newer agent's, or a hostile one's
        self._store(first, draft.record_count, payload, receipt=False)
        self.next_sequence += draft.record_count
        for sequence, frame in enumerate(batch.frames, first):
            self.accepted[sequence] = Record.from_message(record_pb2.Record.FromString(frame))
        for chunk, _ in batch.completed:
            self._place = int(chunk.cursors["log"] or 0)

    def _store(self, first: int, count: int, payload: bytes, *, receipt: bool) -> None:
        self._items[self._next_key] = SpoolItem(self._next_key, self.spool_id, first, count, 5, receipt, payload)
        self._next_key += 1

    def _make_room(self) -> None:
        """Drop-oldest: what is not on its way is replaced by the declaration that it expired."""
        free = [item for key, item in sorted(self._items.items()) if key not in self._window.keys and not item.receipt]
        if len(self._items) < SPOOL_ITEMS_MAX or not free or not self._world.chance(0.3):
            return
        item = free[0]
        del self._items[item.key]
        if self._bug is Bug.DROP_WITHOUT_A_WORD:
            return
        first, count = item.first_sequence, item.record_count
        receipt = declare_expired(self.name, SITE, Limits())(self.spool_id, first, count, item.payload)
        self._store(first, count, receipt, receipt=True)
        self.expired.add(first, first + count)

    def _settle(self, runs: list[tuple[int, int]]) -> None:
        for start, stop in runs:
            self._settled.add(start, stop)
        for key, item in list(self._items.items()):
            if self._settled.covers(item.first_sequence, item.stop_sequence):
                del self._items[key]
        self._window.settled(self.spool_id, runs)
