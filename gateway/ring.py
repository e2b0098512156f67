"""Acknowledgements in the order of receipt, while work ends in any order. Pure.

MQTT wants PUBACKs in the order in which the messages came (MQTT-4.6.0-2; some brokers close the connection otherwise),
and Kafka's reports come in any order. A slot is taken for every message, and what has ended is given out from the head
only. Its length is bounded by whoever fills it.
"""

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Slot(Generic[T]):
    """The place of one message. `done` is set by `Ring.finish`."""

    __slots__ = ("done", "item")

    def __init__(self, item: T) -> None:
        self.item = item
        self.done = False


class Ring(Generic[T]):
    """Slots in the order of receipt."""

    def __init__(self) -> None:
        self._slots: deque[Slot[T]] = deque()

    def __len__(self) -> int:
        return len(self._slots)

    def add(self, item: T) -> Slot[T]:
        """Takes the next slot."""
        slot = Slot(item)
        self._slots.append(slot)
        return slot

    def finish(self, slot: Slot[T]) -> list[T]:
        """Marks a slot as ended; returns the items to acknowledge now, in order.

        A slot is finished once. One that was voided by `clear` gives nothing.
        """
        assert not slot.done, "a slot is finished once"
        slot.done = True
        ready = []
        while self._slots and self._slots[0].done:
            ready.append(self._slots.popleft().item)
        return ready

    def clear(self) -> None:
        """Voids all slots: the connection that they belong to is gone."""
        self._slots.clear()
