"""Which items are on their way, and which must be sent (again). Pure: it is handed the time and the random source.

States of an item: waiting to be sent at `send_at_s`, or sent and waiting for its application acknowledgement until
`send_at_s`, when it is sent again. Each further attempt waits for `ack_timeout_s` plus a delay with full jitter that
doubles up to `ack_timeout_s_max`, so that a fleet that lost the same gateway does not come back in step.

Bounded by items and bytes. A connection that ends makes all items due at once: nothing that was sent on it can be
trusted to have arrived.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from sluice.backoff import Backoff
from sluice.intervals import IntervalSet
from sluice.spool import SpoolItem


@dataclass(frozen=True, slots=True)
class WindowLimits:
    """Bounds of the window, and when an unacknowledged item is sent again."""

    items_max: int
    bytes_max: int
    ack_timeout_s: float
    ack_timeout_s_max: float


@dataclass(slots=True)
class Flight:
    """An item in the window.

    Attributes:
        send_at_s: when it is sent next, unless it is acknowledged before.
        attempts: how often it was sent.
        publishing: it is in the hands of the MQTT client now.
    """

    item: SpoolItem
    send_at_s: float
    backoff: Backoff
    attempts: int = 0
    publishing: bool = False
    settled: IntervalSet = field(default_factory=IntervalSet)


class Window:
    """See the module's docstring.

    Args:
        limits: its bounds.
        rng: for the jitter.
    """

    def __init__(self, limits: WindowLimits, rng: random.Random | None = None) -> None:
        self._limits = limits
        self._rng = rng or random.Random()
        self._flights: dict[int, Flight] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def keys(self) -> frozenset[int]:
        """The spool's keys of all items in the window."""
        return frozenset(self._flights)

    @property
    def items_free(self) -> int:
        """How many items may still be added."""
        return max(0, self._limits.items_max - len(self._flights)) if self.bytes_free > 0 else 0

    @property
    def bytes_free(self) -> int:
        """Room for payloads."""
        return max(0, self._limits.bytes_max - self._bytes)

    def add(self, item: SpoolItem, now_s: float) -> None:
        """Takes an item that is due now. One item may exceed `bytes_max`, or a large one would never leave."""
        assert item.key not in self._flights, "an item is in the window once"
        assert self.items_free, "the window has room"
        limits = self._limits
        backoff = Backoff(limits.ack_timeout_s, max(limits.ack_timeout_s, limits.ack_timeout_s_max), self._rng)
        self._flights[item.key] = Flight(item, now_s, backoff)
        self._bytes += len(item.payload)

    def due(self, now_s: float, count_max: int) -> list[SpoolItem]:
        """Items to send now, in the order of sending."""
        ready = [f for _, f in sorted(self._flights.items()) if not f.publishing and f.send_at_s <= now_s]
        return [flight.item for flight in ready[:count_max]]

    def next_due_s(self) -> float | None:
        """When `due` has something to give; None when nothing waits."""
        return min((f.send_at_s for f in self._flights.values() if not f.publishing), default=None)

    def sending(self, key: int, now_s: float) -> int:
        """Notes that the item goes out now; returns how often it was sent before."""
        flight = self._flights[key]
        before = flight.attempts
        flight.attempts += 1
        flight.publishing = True
        flight.send_at_s = now_s + self._limits.ack_timeout_s + (flight.backoff.next_s() if before else 0.0)
        return before

    def sent(self, key: int) -> None:
        """Notes that the broker has it."""
        flight = self._flights.get(key)
        if flight is not None:
            flight.publishing = False

    def failed(self, key: int, now_s: float) -> None:
        """Notes that the broker does not have it, or nobody listens there: it is tried again after a delay."""
        flight = self._flights.get(key)
        if flight is not None:
            flight.publishing = False
            flight.send_at_s = now_s + flight.backoff.next_s()

    def connection_lost(self, now_s: float) -> None:
        """All items are due, from the first delay on."""
        for flight in self._flights.values():
            flight.publishing = False
            flight.send_at_s = now_s
            flight.backoff.reset()

    def settled(self, spool_id: bytes, runs: Iterable[tuple[int, int]]) -> list[SpoolItem]:
        """Takes out the items that are wholly acknowledged, and returns them.

        Args:
            spool_id: whose sequences.
            runs: acknowledged runs `[start, stop)`.
        """
        done = []
        wanted = list(runs)
        for flight in self._flights.values():
            item = flight.item
            if item.spool_id != spool_id:
                continue
            for start, stop in wanted:
                flight.settled.add(max(start, item.first_sequence), min(stop, item.stop_sequence))
            if flight.settled.covers(item.first_sequence, item.stop_sequence):
                done.append(item)
        for item in done:
            del self._flights[item.key]
            self._bytes -= len(item.payload)
        return done
