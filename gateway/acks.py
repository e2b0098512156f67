"""The application acknowledgements: what is settled is told to the devices, so that it may leave their spools.

Settled ranges are collected for a moment and coalesced, one message per spool. An acknowledgement that gets lost costs
a resend, which is answered from memory; so what waits while the broker is away is bounded by dropping the oldest.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final

from sluice import topics
from sluice.acks import encode_ack
from sluice.backoff import Backoff
from sluice.errors import SluiceError
from sluice.intervals import IntervalSet
from sluice.record import RecordBatch
from sluice.telemetry import Event, Telemetry

ACK_DELAYED = Event(
    name="ack_delayed",
    unit="messages",
    help="Application acknowledgements that could not be published at once.",
    level="debug",
)
ACK_DROPPED = Event(
    name="ack_dropped",
    unit="messages",
    help="Application acknowledgements dropped; the devices resend and are answered then.",
    level="warning",
)

# Delays after a publication that failed although there is a connection: the broker refuses it, or is slow.
_RETRY_S_FIRST: Final = 0.05
_RETRY_S_MAX: Final = 5.0


class Acks:
    """Collects and publishes.

    Args:
        site: of the topics.
        publish: sends to a topic; raises when it cannot.
        cumulative: gives the sequence below which all is settled, by device and spool.
        telemetry: for events.
        delay_s: how long ranges are collected.
        spools_max: spools with something to tell.
        parallel_max: publications at once.
    """

    def __init__(
        self,
        site: str,
        publish: Callable[[str, bytes], Awaitable[object]],
        cumulative: Callable[[str, bytes], int],
        telemetry: Telemetry,
        *,
        delay_s: float,
        spools_max: int,
        parallel_max: int = 16,
    ) -> None:
        self._site = site
        self._publish = publish
        self._cumulative = cumulative
        self._telemetry = telemetry
        self._delay_s = delay_s
        self._spools_max = spools_max
        self._parallel = asyncio.Semaphore(parallel_max)
        self._waiting: OrderedDict[tuple[str, bytes], IntervalSet] = OrderedDict()
        self._some = asyncio.Event()

    def add(self, batch: RecordBatch) -> None:
        """The batch is settled."""
        self._put(batch.device_id, batch.spool_id, IntervalSet([(batch.first_sequence, batch.stop_sequence)]))

    async def run(self, connected: Callable[[], Awaitable[None]]) -> None:
        """Publishes until cancelled.

        Args:
            connected: returns when there is a connection.
        """
        backoff = Backoff(_RETRY_S_FIRST, _RETRY_S_MAX)
        while True:
            await self._some.wait()
            await connected()
            await asyncio.sleep(self._delay_s)
            if await self.flush():
                backoff.reset()
            else:
                await asyncio.sleep(backoff.next_s())

    async def flush(self) -> bool:
        """Publishes what has been collected; what cannot be sent stays, and the answer is False."""
        self._some.clear()
        waiting, self._waiting = self._waiting, OrderedDict()
        return all(await asyncio.gather(*(self._send(*spool, ranges) for spool, ranges in waiting.items())))

    async def _send(self, device_id: str, spool_id: bytes, ranges: IntervalSet) -> bool:
        payload = encode_ack(spool_id, self._cumulative(device_id, spool_id), ranges.runs())
        try:
            async with self._parallel:
                await self._publish(topics.topic(self._site, device_id, topics.ACK), payload)
        except SluiceError as error:
            self._telemetry.emit(ACK_DELAYED, device=device_id, detail=str(error))
            self._put(device_id, spool_id, ranges)
            return False
        return True

    def _put(self, device_id: str, spool_id: bytes, ranges: IntervalSet) -> None:
        collected = self._waiting.setdefault((device_id, spool_id), IntervalSet())
        for start, stop in ranges.runs():
            collected.add(start, stop)
        if len(self._waiting) > self._spools_max:
            (device, _), _ranges = self._waiting.popitem(last=False)
            self._telemetry.emit(ACK_DROPPED, device=device)
        self._some.set()
