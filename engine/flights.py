"""Texts under way and who waits for them: identical texts are computed once.

A flight is one distinct text on its way through scheduler and device; callers board it and leave it. When
the last one left, a flight that still waits in the queue is cancelled. Lives on the event loop's thread
only.
"""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from engine.failures import DeadlinePassed
from engine.lane import Item, Priority
from engine.prepare import Prepared
from engine.results import Output
from engine.runner import Report, Runner

NO_DEADLINE: Final = float("inf")


class Call:
    """One call of `analyze`: its outcomes, by position.

    Args:
        texts: how many.
    """

    def __init__(self, texts: int) -> None:
        self.outcomes: list[Output | Exception | None] = [None] * texts
        self.flights: set[int] = set()
        self._missing = texts
        self._done = asyncio.Event()

    def deliver(self, position: int, outcome: Output | Exception) -> None:
        """Sets an outcome; the first one counts."""
        if self.outcomes[position] is None:
            self.outcomes[position] = outcome
            self._missing -= 1
            if not self._missing:
                self._done.set()

    async def wait(self) -> None:
        """Until every outcome is there."""
        if self._missing:
            await self._done.wait()


@dataclass(slots=True)
class _Flight:
    key: bytes
    tokens: int
    dropped: int
    cache: bool
    priority: Priority
    deadline_s: float
    waiters: list[tuple[Call, int]] = field(default_factory=list)


class Flights:
    """All flights of one engine.

    Args:
        runner: computes them.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._ids = itertools.count()
        self._by_id: dict[int, _Flight] = {}
        self._by_key: dict[bytes, int] = {}
        self._settled = asyncio.Event()
        self.coalesced = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def board(
        self,
        call: Call,
        wanted: Sequence[tuple[int, Prepared]],
        *,
        now_s: float,
        priority: Priority,
        deadline_s: float,
        cache: bool,
    ) -> None:
        """Puts texts under way, all or none.

        Args:
            call: who waits.
            wanted: position in the call, and the text with its token ids.
            now_s: the runner's time.
            priority: of the call.
            deadline_s: on the runner's clock.
            cache: whether the result may be remembered.

        Raises:
            Backpressure: the queue is full; nothing was put under way.
        """
        new: dict[bytes, tuple[Item, Prepared]] = {}
        for _, text in wanted:
            if text.key not in self._by_key and text.key not in new:
                assert text.ids is not None
                item = Item(next(self._ids), len(text.ids), priority, now_s, deadline_s)
                new[text.key] = (item, text)
        if new:
            rows = [text.ids for _, text in new.values() if text.ids is not None]
            self._runner.add([item for item, _ in new.values()], rows)
        for key, (item, text) in new.items():
            self._by_key[key] = item.id
            self._by_id[item.id] = _Flight(key, item.tokens, text.dropped, cache, priority, deadline_s)
        self.coalesced += len(wanted) - len(new)
        for position, text in wanted:
            self._join(call, position, self._by_key[text.key], priority, deadline_s, cache=cache)

    def leave(self, call: Call) -> None:
        """The call does not wait any more: cancels what nobody else waits for."""
        empty = []
        for flight_id in call.flights & self._by_id.keys():
            flight = self._by_id[flight_id]
            flight.waiters = [waiter for waiter in flight.waiters if waiter[0] is not call]
            if not flight.waiters:
                empty.append(flight_id)
        # What is on the device already stays known: its result may still serve a later caller.
        for flight_id in self._runner.cancel(empty):
            self._forget(flight_id)
        call.flights.clear()
        if empty:
            self._wake()

    def settle(self, report: Report) -> list[tuple[bytes, Output]]:
        """Hands a batch's outcomes to who waits. Returns what may be remembered."""
        fresh = []
        for flight_id, outcome in report.outputs.items():
            flight = self._forget(flight_id)
            if flight is None:
                continue
            result = outcome if isinstance(outcome, Exception) else Output(outcome, flight.tokens, flight.dropped)
            if flight.cache and isinstance(result, Output):
                fresh.append((flight.key, result))
            _deliver(flight, result)
        for flight_id in report.expired:
            flight = self._forget(flight_id)
            if flight is not None:
                _deliver(flight, DeadlinePassed("its deadline passed while it waited"))
        self._wake()
        return fresh

    def fail(self, error: Exception) -> None:
        """Everything under way gets the error."""
        for flight_id in list(self._by_id):
            flight = self._forget(flight_id)
            if flight is not None:
                _deliver(flight, error)
        self._wake()

    async def room(self, seconds_max: float) -> None:
        """Until something was settled, at most `seconds_max` seconds."""
        settled = self._settled
        try:
            async with asyncio.timeout(seconds_max):
                await settled.wait()
        except TimeoutError:
            return

    def _join(
        self, call: Call, position: int, flight_id: int, priority: Priority, deadline_s: float, *, cache: bool
    ) -> None:
        flight = self._by_id[flight_id]
        flight.waiters.append((call, position))
        flight.cache = flight.cache or cache
        call.flights.add(flight_id)
        if priority < flight.priority or deadline_s > flight.deadline_s:
            flight.priority = min(flight.priority, priority)
            flight.deadline_s = max(flight.deadline_s, deadline_s)
            self._runner.promote(flight_id, flight.priority, flight.deadline_s)

    def _forget(self, flight_id: int) -> _Flight | None:
        flight = self._by_id.pop(flight_id, None)
        if flight is not None:
            del self._by_key[flight.key]
        return flight

    def _wake(self) -> None:
        self._settled.set()
        self._settled = asyncio.Event()


def _deliver(flight: _Flight, outcome: Output | Exception) -> None:
    for call, position in flight.waiters:
        call.deliver(position, outcome)
