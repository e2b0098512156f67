"""Built messages, shared: the first subscriber that needs an entry has it built, the others get the same bytes.

Bounded by bytes; the entry used longest ago goes first. Whoever asks while an entry is being built waits for that
build; a waiter that is cancelled does not cancel it for the others.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from central.feed_batches import Part
from central.tokens import Partition

Key = tuple[int, Partition, int]  # epoch, partition, offset
# Of one entry (key, list, place in the order) or part, measured.
_OVERHEAD_BYTES: Final = 256


class PartCache:
    """See the module's docstring.

    Args:
        bytes_max: of all bodies that are kept.
    """

    def __init__(self, bytes_max: int) -> None:
        self.bytes_held = 0
        self._bytes_max = bytes_max
        self._built: OrderedDict[Key, list[Part]] = OrderedDict()
        self._building: dict[Key, asyncio.Task[list[Part]]] = {}

    async def get(self, key: Key, build: Callable[[], list[Part]]) -> list[Part]:
        """The parts of an entry; `build` runs on a thread when they are not here.

        Raises:
            Permanent: as `build` does, for everyone who waits.
        """
        parts = self._built.get(key)
        if parts is not None:
            self._built.move_to_end(key)
            return parts
        task = self._building.get(key)
        if task is None:
            task = asyncio.create_task(self._build(key, build))
            self._building[key] = task
        return await asyncio.shield(task)

    async def _build(self, key: Key, build: Callable[[], list[Part]]) -> list[Part]:
        try:
            parts = await asyncio.to_thread(build)
        finally:
            del self._building[key]
        self._built[key] = parts
        self.bytes_held += _size(parts)
        while self.bytes_held > self._bytes_max:
            _, oldest = self._built.popitem(last=False)
            self.bytes_held -= _size(oldest)
        return parts


def _size(parts: list[Part]) -> int:
    # Most of a small entry is what Python keeps beside it; a receipt has no part at all, and still takes a place.
    return _OVERHEAD_BYTES + sum(len(part.body) + _OVERHEAD_BYTES for part in parts)
