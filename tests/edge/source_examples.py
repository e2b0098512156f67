"""What the sources' tests share: running a source against a memory of cursors instead of a spool."""

import asyncio
import io
import json
from collections.abc import Callable
from typing import Any

from edge.records import Chunk
from edge.sources.base import ChunkSource, SourceContext
from protos import record_pb2
from sluice.codec import Limits
from sluice.record import Record
from sluice.telemetry import Telemetry

TIMEOUT_S = 10.0


class Bench:
    """Runs sources; keeps what a spool would: records, and the cursors that were stored with them."""

    def __init__(self, **limits: int) -> None:
        self.cursors: dict[str, bytes] = {}
        self.records: list[Record] = []
        self.log = io.StringIO()
        self.limits = Limits(**limits)
        self.telemetry = Telemetry("test", stream=self.log)

    @property
    def context(self) -> SourceContext:
        return SourceContext(self.limits, self.telemetry, dict(self.cursors), lambda: 1_000_000)

    @property
    def texts(self) -> list[str]:
        return [record.text for record in self.records]

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    def store(self, chunk: Chunk) -> None:
        for frame in chunk.frames:
            self.records.append(Record.from_message(record_pb2.Record.FromString(frame)))
        for name, place in chunk.cursors.items():
            if place is None:
                self.cursors.pop(name, None)
            else:
                self.cursors[name] = place

    async def until(self, check: Callable[[], object]) -> None:
        """Waits until the condition holds."""
        async with asyncio.timeout(TIMEOUT_S):
            while not check():  # noqa: ASYNC110 - what is checked has no event
                await asyncio.sleep(0.005)

    async def run(self, source: ChunkSource, until: Callable[[], object] = lambda: False) -> None:
        """Stores what the source delivers until it ends or the condition holds."""

        async def pump() -> None:
            async for delivery in source.deliveries():
                self.store(delivery.batch)
                delivery.ack()
                if until():
                    source.stop()

        async with asyncio.timeout(TIMEOUT_S):
            await pump()
