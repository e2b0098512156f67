"""Texts under way and who waits for them: identical texts are computed once.

A flight is one distinct text on its way through scheduler and device; callers board it and leave it. When
the last one left, a flight that still waits in the queue is cancelled. Lives on the event loop's thread
only.

Calls that were accepted wait for room in the queue in two lines, one for each priority, and nobody overtakes within
one. While online waits in its line, background does not board; but when the first one of background has seen as many
online tokens pass as the queue may hold, it is next, and online waits for it. So every line moves on.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from engine.failures import DeadlinePassed
from engine.lane import Item, Priority
from engine.prepare import Prepared
from engine.results import Output
from engine.runner import Report, Runner
from sluice.errors import Backpressure, Retryable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

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


@dataclass(slots=True, eq=False)
class Place:
    """A place in the line of those who wait for room.

    Attributes:
        retry_after_s: when there may be room for it.
        passed_tokens: of the other priority, that got room while it was the first in its line.
        called: there may be room for it now.
    """

    retry_after_s: float
    passed_tokens: int = 0
    called: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class _Flight:
    key: bytes
    ids: "npt.NDArray[np.int32]"
    dropped: int
    cache: bool
    priority: Priority
    deadline_s: float
    waiters: dict[Call, list[int]] = field(default_factory=dict)  # positions in each call


class Flights:
    """All flights of one engine.

    Args:
        runner: computes them.
        calls_in_line_max: calls of a priority that wait for room; a further one is refused.
        passed_tokens_max: online tokens that pass the first one in the line of background.
    """

    def __init__(self, runner: Runner, calls_in_line_max: int, passed_tokens_max: int) -> None:
        self._runner = runner
        self._calls_in_line_max = calls_in_line_max
        self._passed_tokens_max = passed_tokens_max
        self._ids = itertools.count()
        self._by_id: dict[int, _Flight] = {}
        self._by_key: dict[bytes, int] = {}
        # Who waits for room, in the order of arrival: one chunk per call that was accepted.
        self._lines: dict[Priority, deque[Place]] = {priority: deque() for priority in Priority}
        self.coalesced = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def admit(self, priority: Priority) -> None:
        """Asks whether a new call may come in: before its texts have cost anything.

        While others wait for room it may join them, or a large call would keep all others out until it ends; and
        background may line up when it is online that leaves it no room, or it would never have its turn.

        Raises:
            Backpressure: the queue is full and nobody waits for room in it, or too many do.
            Retryable: the runner takes nothing.
        """
        line = self._lines[priority]
        if len(line) >= self._calls_in_line_max:
            raise Backpressure(
                f"inference queue is full: {len(line)} earlier calls wait for room in it (engine.calls_in_line_max)",
                retry_after_s=line[0].retry_after_s,
            )
        try:
            self._runner.admit(priority)
        except Backpressure:
            if not line and (priority is Priority.ONLINE or not self._runner.crowded_out):
                raise

    async def board(
        self,
        call: Call,
        wanted: Sequence[tuple[int, Prepared]],
        *,
        clock: Callable[[], float],
        priority: Priority,
        deadline_s: float,
        cache: bool,
    ) -> None:
        """Puts texts under way, all together: at once, or when there is room and it is their turn in the line.

        Args:
            call: who waits.
            wanted: position in the call, and the text with its token ids.
            clock: the runner's.
            priority: of the call.
            deadline_s: on the runner's clock.
            cache: whether the result may be remembered.

        Raises:
            Retryable: the runner takes nothing.
        """
        try_to = partial(self._board, call, wanted, priority=priority, deadline_s=deadline_s, cache=cache)
        try:
            try_to(now_s=clock(), place=None)
        except Backpressure as full:
            retry_after_s = full.retry_after_s
        else:
            return
        with self._in_line(priority, retry_after_s) as place:
            while True:
                await self._room(place)
                try:
                    try_to(now_s=clock(), place=place)
                except Backpressure as full:
                    place.retry_after_s = full.retry_after_s
                else:
                    break

    def _board(
        self,
        call: Call,
        wanted: Sequence[tuple[int, Prepared]],
        *,
        now_s: float,
        priority: Priority,
        deadline_s: float,
        cache: bool,
        place: Place | None,
    ) -> None:
        """Puts texts under way, all or none.

        Raises:
            Backpressure: the queue is full, or others wait for room already; nothing was put under way.
        """
        new: dict[bytes, tuple[Item, Prepared]] = {}
        for _, text in wanted:
            if text.key not in self._by_key and text.key not in new:
                assert text.ids is not None, "neither known nor tokenised"
                item = Item(next(self._ids), len(text.ids), priority, now_s, deadline_s)
                new[text.key] = (item, text)
        if new:
            self._wait_in_line(priority, place)
            rows = [text.ids for _, text in new.values() if text.ids is not None]
            self._runner.add([item for item, _ in new.values()], rows)
            background = self._lines[Priority.BACKGROUND]
            if background and priority is Priority.ONLINE:
                background[0].passed_tokens += sum(map(len, rows))
        for key, (item, text) in new.items():
            self._by_key[key] = item.id
            assert text.ids is not None
            self._by_id[item.id] = _Flight(key, text.ids, text.dropped, cache, priority, deadline_s)
        self.coalesced += len(wanted) - len(new)
        for position, text in wanted:
            self._join(call, position, self._by_key[text.key], priority, deadline_s, cache=cache)

    def leave(self, call: Call) -> None:
        """The call does not wait any more: cancels what nobody else waits for."""
        empty = []
        for flight_id in call.flights & self._by_id.keys():
            flight = self._by_id[flight_id]
            flight.waiters.pop(call, None)
            if not flight.waiters:
                empty.append(flight_id)
        # What is on the device already stays known: its result may still serve a later caller.
        for flight_id in self._runner.cancel(empty):
            self._forget(flight_id)
        call.flights.clear()
        if empty:
            self._wake()

    def settle(self, report: Report, now_s: float) -> list[tuple[bytes, Output]]:
        """Hands a batch's outcomes to who waits. Returns what may be remembered.

        Args:
            report: of the batch.
            now_s: the runner's time.
        """
        fresh = []
        wrong = _not_finite(report)
        for flight_id, outcome in report.outputs.items():
            flight = self._forget(flight_id)
            if flight is None:
                continue
            result: Output | Exception
            if isinstance(outcome, Exception):
                result = outcome
            elif flight_id in wrong:
                result = Retryable("the device's output for it is not finite (NaN or infinity)")
            else:
                result = Output(outcome, len(flight.ids), flight.dropped)
            if flight.cache and isinstance(result, Output):
                fresh.append((flight.key, result))
            _deliver(flight, result)
        for flight_id in report.expired:
            self._expired(flight_id, now_s)
        self._wake()
        return fresh

    def fail(self, error: Exception) -> None:
        """Everything under way gets the error."""
        for flight_id in list(self._by_id):
            flight = self._forget(flight_id)
            if flight is not None:
                _deliver(flight, error)
        self._wake()

    @contextmanager
    def _in_line(self, priority: Priority, retry_after_s: float) -> Iterator[Place]:
        """The last place in the line of a priority."""
        place = Place(retry_after_s)
        self._lines[priority].append(place)
        try:
            yield place
        finally:
            self._lines[priority].remove(place)
            self._wake()

    async def _room(self, place: Place) -> None:
        """Until the place is the first one of its line and something was settled, or its `retry_after_s` passed."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(place.retry_after_s):
                    await place.called.wait()
            place.called.clear()
            if any(line and line[0] is place for line in self._lines.values()):
                return

    def _join(
        self, call: Call, position: int, flight_id: int, priority: Priority, deadline_s: float, *, cache: bool
    ) -> None:
        flight = self._by_id[flight_id]
        flight.waiters.setdefault(call, []).append(position)
        flight.cache = flight.cache or cache
        call.flights.add(flight_id)
        if priority < flight.priority or deadline_s > flight.deadline_s:
            flight.priority = min(flight.priority, priority)
            flight.deadline_s = max(flight.deadline_s, deadline_s)
            self._runner.promote(flight_id, flight.priority, flight.deadline_s)

    def _expired(self, flight_id: int, now_s: float) -> None:
        """Its deadline passed; unless a later one was set while it was on a device: then it goes once more.

        Only what came back from a device that died can have an older deadline than its flight, so it runs alone.
        """
        flight = self._by_id.get(flight_id)
        error: Exception = DeadlinePassed("its deadline passed while it waited")
        if flight is not None and flight.waiters and flight.deadline_s > now_s:
            item = Item(flight_id, len(flight.ids), flight.priority, now_s, flight.deadline_s, alone=True)
            try:
                self._runner.add([item], [flight.ids])
            except (Retryable, Backpressure) as refused:
                error = Retryable(f"its device died, and it could not be run once more: {refused}")
            else:
                return
        if self._forget(flight_id) is not None and flight is not None:
            _deliver(flight, error)

    def _wait_in_line(self, priority: Priority, place: Place | None) -> None:
        line, other = self._lines[priority], self._lines[Priority(1 - priority)]
        background = self._lines[Priority.BACKGROUND]
        overdue = bool(background) and background[0].passed_tokens >= self._passed_tokens_max
        other_first = bool(other) and overdue == (priority is Priority.ONLINE)
        if (line and line[0] is not place) or other_first:
            raise Backpressure(
                "inference queue is full: an earlier call waits for room in it (engine.queue_tokens_max)",
                retry_after_s=(other if other_first else line)[0].retry_after_s,
            )

    def _forget(self, flight_id: int) -> _Flight | None:
        flight = self._by_id.pop(flight_id, None)
        if flight is not None:
            del self._by_key[flight.key]
        return flight

    def _wake(self) -> None:
        for line in self._lines.values():
            if line:
                line[0].called.set()


def _deliver(flight: _Flight, outcome: Output | Exception) -> None:
    for call, positions in flight.waiters.items():
        for position in positions:
            call.deliver(position, outcome)


def _not_finite(report: Report) -> set[int]:
    """Whose output rows hold a NaN or an infinity; one look at the whole batch, nearly always."""
    import numpy as np

    rows = {flight_id: row for flight_id, row in report.outputs.items() if not isinstance(row, Exception)}
    if not rows or np.isfinite(np.concatenate([row.ravel() for row in rows.values()])).all():
        return set()
    return {flight_id for flight_id, row in rows.items() if not np.isfinite(row).all()}
