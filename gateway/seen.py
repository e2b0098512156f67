"""What the gateway remembers of envelopes that it has seen, so that a resend is recognised. Pure.

Invariants:
  * `settled` only ever holds what is durable where it had to go: it was acknowledged, and may be again at any time.
  * A range is in flight from `admit` (NEW) until `settle` or `release`.
  * Memory is bounded: spools and envelope checksums by least recent use, runs per spool by dropping the lowest. What is
    forgotten (or lost in a restart) costs a second passage, never a record: the lake de-duplicates.

The same positions with the same gaps and other bytes mean that two devices run one spool (a cloned disk): REUSED.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from enum import Enum

from sluice.intervals import IntervalSet
from sluice.record import Gap, RecordBatch

Spool = tuple[str, bytes]
_Envelope = tuple[str, bytes, int, int, bytes]


class Arrival(Enum):
    """What an envelope is to us."""

    NEW = "new"
    IN_FLIGHT = "in_flight"
    SETTLED = "settled"
    REUSED = "reused"


class Seen:
    """The memory.

    Args:
        spools_max: spools whose settled positions are remembered.
        runs_per_spool_max: runs of settled positions per spool.
        envelopes_max: envelopes whose checksum is remembered.
    """

    def __init__(self, *, spools_max: int, runs_per_spool_max: int, envelopes_max: int) -> None:
        assert min(spools_max, runs_per_spool_max, envelopes_max) >= 1, "at least one of each"
        self._spools_max = spools_max
        self._runs_max = runs_per_spool_max
        self._envelopes_max = envelopes_max
        self._settled: OrderedDict[Spool, IntervalSet] = OrderedDict()
        self._in_flight: dict[Spool, list[tuple[int, int]]] = {}
        self._checksums: OrderedDict[_Envelope, bytes] = OrderedDict()

    def admit(self, batch: RecordBatch, checksum: bytes) -> Arrival:
        """Says what a batch is to us; a NEW one is in flight from now on.

        Args:
            batch: its range, gaps and spool count, not its records.
            checksum: of its records; any hash.
        """
        spool = (batch.device_id, batch.spool_id)
        if self._is_reused(batch, checksum):
            return Arrival.REUSED
        start, stop = batch.first_sequence, batch.stop_sequence
        settled = self._settled.get(spool)
        if settled is not None and settled.covers(start, stop):
            self._settled.move_to_end(spool)
            return Arrival.SETTLED
        flying = self._in_flight.setdefault(spool, [])
        if flying and IntervalSet(flying).covers(start, stop):
            return Arrival.IN_FLIGHT
        flying.append((start, stop))
        return Arrival.NEW

    def settle(self, batch: RecordBatch) -> None:
        """The batch, admitted as NEW, is durable."""
        self.release(batch)
        spool = (batch.device_id, batch.spool_id)
        settled = self._settled.setdefault(spool, IntervalSet())
        self._settled.move_to_end(spool)
        settled.add(batch.first_sequence, batch.stop_sequence)
        while settled.run_count > self._runs_max:
            settled.remove(*settled.runs()[0])
        while len(self._settled) > self._spools_max:
            self._settled.popitem(last=False)

    def release(self, batch: RecordBatch) -> None:
        """The batch, admitted as NEW, is not in flight any more; a resend is new again."""
        spool = (batch.device_id, batch.spool_id)
        flying = self._in_flight[spool]
        flying.remove((batch.first_sequence, batch.stop_sequence))
        if not flying:
            del self._in_flight[spool]

    def cumulative(self, device_id: str, spool_id: bytes) -> int:
        """All sequences below this are settled; 0 when unknown."""
        settled = self._settled.get((device_id, spool_id))
        if settled is None or not settled.run_count:
            return 0
        start, stop = settled.runs()[0]
        return stop if start == 0 else 0

    def _is_reused(self, batch: RecordBatch, checksum: bytes) -> bool:
        # Positions that expired since make a resend differ honestly; they show as gaps, which are part of the key.
        # As a digest: an envelope may hold 50,000 gaps, and what is remembered of it is bounded in number, not in size.
        key = (*batch.identity, batch.record_count, _digest(batch.gaps))
        known = self._checksums.setdefault(key, checksum)
        self._checksums.move_to_end(key)
        if len(self._checksums) > self._envelopes_max:
            self._checksums.popitem(last=False)
        return known != checksum


def _digest(gaps: Sequence[Gap]) -> bytes:
    if not gaps:
        return b""
    numbers = ";".join(f"{gap.first_sequence},{gap.count},{gap.reason.value}" for gap in gaps)
    return hashlib.blake2b(numbers.encode(), digest_size=16).digest()
