"""A queue ordered by due time whose members can leave from the middle. Pure."""

from dataclasses import dataclass
from enum import IntEnum
from heapq import heapify, heappop, heappush
from typing import Final

# Below this many dead entries a rebuild of the heap is not worth it.
_DEAD_MIN: Final = 64


class Priority(IntEnum):
    """Who is waiting: a person or caller (online), or the stream (background)."""

    ONLINE = 0
    BACKGROUND = 1


@dataclass(frozen=True, slots=True)
class Item:
    """A text that waits, as far as the scheduler needs to know it.

    Attributes:
        id: the caller's, unique among what waits.
        tokens: its length.
        priority: whose it is.
        arrived_s: when, on the caller's monotonic clock.
        deadline_s: after this moment its result is worthless; infinity for none.
        alone: it shares its batch with nobody: its last one was lost, perhaps on its account.
    """

    id: int
    tokens: int
    priority: Priority
    arrived_s: float
    deadline_s: float = float("inf")
    alone: bool = False


class Lane:
    """Items of one bucket and one priority, the one that is due first in front.

    Removal is lazy: a removed item's entry stays in the heap until it surfaces, or until more than half of
    the heap is dead; so memory is bounded by what waits.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int]] = []  # due, arrival number, id
        self._live: dict[int, tuple[Item, float, int]] = {}  # item, due, arrival number
        self._count = 0

    def __len__(self) -> int:
        return len(self._live)

    def push(self, item: Item, due_s: float) -> None:
        """Adds an item that is due at `due_s`; equal due times keep the order of arrival."""
        assert item.id not in self._live, f"item {item.id} waits already"
        self._count += 1
        self._live[item.id] = (item, due_s, self._count)
        heappush(self._heap, (due_s, self._count, item.id))

    def remove(self, item_id: int) -> Item:
        """Takes an item out, wherever it stands."""
        item = self._live.pop(item_id)[0]
        if len(self._heap) > 2 * len(self._live) + _DEAD_MIN:
            self._heap = [(due, number, id_) for id_, (_, due, number) in self._live.items()]
            heapify(self._heap)
        return item

    def head(self) -> tuple[Item, float] | None:
        """The item that is due first, and when; None when empty."""
        while self._heap:
            _, number, item_id = self._heap[0]
            entry = self._live.get(item_id)
            if entry is not None and entry[2] == number:
                return entry[0], entry[1]
            heappop(self._heap)
        return None

    def pop(self) -> Item:
        """Takes the item that is due first."""
        found = self.head()
        assert found is not None, "pop from an empty lane"
        heappop(self._heap)
        del self._live[found[0].id]
        return found[0]
