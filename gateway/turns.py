"""Turns: those of one key go in the order in which they queued, those of different keys do not wait for each other.

Deliveries are classified concurrently, so they are ready in any order; each takes its turn on arrival and enters the
bridge in that order, so that a device's envelopes lie in Kafka as it sent them. A turn that is never left would block
its device: `with` leaves it, whatever happens.
"""

import asyncio
from types import TracebackType
from typing import Self


class Turns:
    """The queues by key. A key costs memory only while somebody has a turn."""

    def __init__(self) -> None:
        self._last: dict[str, Turn] = {}

    def __len__(self) -> int:
        return len(self._last)

    def take(self, key: str) -> "Turn":
        """The next turn of a key."""
        turn = self._last[key] = Turn(self, key, self._last.get(key))
        return turn

    def forget(self, key: str) -> None:
        """Drops the queue of a key when all of its turns are over."""
        turn = self._last.get(key)
        while turn is not None:
            if not turn.over.is_set():
                return
            turn = turn.previous
        self._last.pop(key, None)


class Turn:
    """One place in a queue.

    Attributes:
        previous: the turn that this one waits for; None when there is none any more.
        over: set when this one has left.
    """

    def __init__(self, turns: Turns, key: str, previous: "Turn | None") -> None:
        self.key = key
        self._turns = turns
        self.previous = previous
        self.over = asyncio.Event()

    async def come(self) -> None:
        """Returns when all earlier turns of the key are over."""
        while self.previous is not None:
            await self.previous.over.wait()
            # One that left before its turn came still stands for those ahead of it.
            self.previous = self.previous.previous

    def leave(self) -> None:
        """Lets the next one in. A second call does nothing."""
        if self.over.is_set():
            return
        while self.previous is not None and self.previous.over.is_set():
            self.previous = self.previous.previous
        self.over.set()
        self._turns.forget(self.key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.leave()
