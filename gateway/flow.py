"""The path of an envelope through the gateway, from the inbox to the site's store and the bridge.

Each delivery has a task of its own; the inbox bounds how many there are. What stays is made durable first, then the
rest (or the receipt) goes over the bridge, in the order in which the device sent it. Any failure on the way nacks the
delivery: nothing further of it is written, and the device resends. Only what Kafka will never take (too large for its
topic) goes to the quarantine, since a resend would fail for ever.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from gateway.batches import ExportBatch, LocalBatch
from gateway.judge import Judge
from gateway.quarantine import Refusal
from gateway.turns import Turn, Turns
from sluice.codec import RejectReason, encode
from sluice.delivery import Delivery, Sink
from sluice.errors import Permanent
from sluice.record import RecordBatch


class ExportSink(Protocol):
    """Where what leaves becomes durable (`Bridge`)."""

    async def write(self, batch: ExportBatch, *, on_queued: Callable[[], None] | None = None) -> None:
        """Returns if and only if the batch is durable; calls `on_queued` when its place in the order is fixed."""
        ...


class Flow:
    """The service that moves deliveries.

    Args:
        deliveries: from the inbox; the flow ends with them.
        judge: says what stays and what leaves.
        local: the site's store and analysis.
        bridge: the way out.
        refuse: keeps on the site what the way out will never take, and declares it.
    """

    name = "flow"

    def __init__(
        self,
        deliveries: AsyncIterator[Delivery[RecordBatch]],
        judge: Judge,
        local: Sink[LocalBatch],
        bridge: ExportSink,
        refuse: Callable[[Refusal], Awaitable[None]],
    ) -> None:
        self._deliveries = deliveries
        self._judge = judge
        self._local = local
        self._bridge = bridge
        self._refuse = refuse
        self._turns = Turns()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def in_flight(self) -> int:
        """Deliveries under way."""
        return len(self._tasks)

    async def run(self) -> None:
        """Moves deliveries until there are no more."""
        try:
            async for delivery in self._deliveries:
                task = asyncio.create_task(self._move(delivery, self._turns.take(delivery.batch.device_id)))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            if self._tasks:
                await asyncio.wait(set(self._tasks))
        finally:
            await self._cancel()

    async def drain(self, deadline_s: float) -> None:
        """Lets what is under way end in half of the time (the inbox takes no more), then gives it back (nack)."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=deadline_s / 2)
        await self._cancel()
        self._judge.close()

    async def _move(self, delivery: Delivery[RecordBatch], turn: Turn) -> None:
        with turn:
            async with delivery:  # ack on exit, nack on error
                local, export = await self._judge.parts(delivery.batch)
                if local is not None:
                    await self._local.write(local)
                await turn.come()
                try:
                    await self._bridge.write(export, on_queued=turn.leave)
                except Permanent as error:
                    await self._refuse(_refusal(delivery.batch, export, error))

    async def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._tasks, return_exceptions=True)


def _refusal(batch: RecordBatch, export: ExportBatch, error: Permanent) -> Refusal:
    """For a batch that the bridge will never take: all of it is kept, and what would have left is declared."""
    return Refusal(
        site=batch.site,
        device_id=batch.device_id,
        payload=encode(batch).payload,
        reason=RejectReason.ENVELOPE_BYTES,
        detail=str(error),
        received_time_us=batch.received_time_us,
        claim=export.to_record_batch(),
    )
