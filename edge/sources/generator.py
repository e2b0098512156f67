"""Made-up records at a given rate, for load and tests.

Record i depends only on the seed and i, and the number of records delivered is the cursor: after a crash the generator
goes on behind the last durable record, so every index arrives exactly once.
"""

import asyncio
import random
from collections.abc import AsyncGenerator
from typing import Final

from edge.config import GeneratorConfig
from edge.records import Chunk, serialize
from edge.sources.base import SourceContext, StopFlag, delivery
from sluice.delivery import Delivery
from sluice.record import Record

# Chunks a second at high rates, and the size that bounds one.
_TICK_S: Final = 0.05
_CHUNK_BYTES: Final = 64 * 1024
_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz     "


class GeneratorSource:
    """See the module's docstring; records have `metrics["index"]`."""

    def __init__(self, config: GeneratorConfig, context: SourceContext) -> None:
        self._config = config
        self._context = context
        self._stop = StopFlag()
        self._cursor = f"{config.identity}:count"
        self._at = int(context.cursors.get(self._cursor, b"0"))

    @property
    def name(self) -> str:
        """Its identity."""
        return self._config.identity

    def stop(self) -> None:
        """Ends it."""
        self._stop.set()

    async def deliveries(self) -> AsyncGenerator[Delivery[Chunk], None]:
        """Chunks at `rate_per_s`; a delay is made up for."""
        config = self._config
        loop = asyncio.get_running_loop()
        chunk_max = max(1, _CHUNK_BYTES // (config.text_bytes + 32))
        started_s, first = loop.time(), self._at
        while not self._stop.is_set and self._left() != 0:
            # The next record is due at first + its number / rate.
            due = int((loop.time() - started_s) * config.rate_per_s) + 1 - (self._at - first)
            left = self._left()
            count = min(due, chunk_max, due if left is None else left)
            if count > 0:
                yield delivery(self._chunk(count))
            if count < chunk_max:
                wait_s = max(_TICK_S, (self._at - first) / config.rate_per_s - (loop.time() - started_s))
                await self._stop.wait(wait_s)

    def _left(self) -> int | None:
        return None if self._config.count is None else max(0, self._config.count - self._at)

    def _chunk(self, count: int) -> Chunk:
        now_us = self._context.now_us()
        frames = [serialize(self._record(i, now_us), self._context.limits) for i in range(self._at, self._at + count)]
        self._at += count
        return Chunk(self._config.key, frames, now_us, cursors={self._cursor: b"%d" % self._at})

    def _record(self, index: int, now_us: int) -> Record:
        rng = random.Random(self._config.seed * 1_000_003 + index)
        text = "".join(rng.choices(_ALPHABET, k=self._config.text_bytes))
        return Record(event_time_us=now_us, text=text, metrics={"index": float(index)})
