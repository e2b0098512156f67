"""Decides, in a thread and within a time, what becomes of a batch. In doubt it stays.

The classifier is C code over the whole batch. A time-out cannot stop it, but it stops us from waiting: the batch stays
on the site, wholly, and so does every batch that finds no thread in time. An error has the same consequence. Nothing
that a classifier does or fails to do can let a record out.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from gateway.batches import Verdict
from gateway.path_config import RoutingConfig
from gateway.router import IN_DOUBT, Parts, route
from sluice.record import RecordBatch
from sluice.telemetry import Event, Telemetry

IN_DOUBT_KEPT = Event(
    name="classification_failed",
    unit="envelopes",
    help="Envelopes that stay on the site wholly, because they could not be classified.",
    labels=("reason",),
    level="error",
)


class Judge:
    """Runs a classifier.

    Args:
        classify: gives the verdict for a batch; may block, may raise. Called from several threads at once.
        config: threads and time.
        telemetry: for events.
    """

    def __init__(self, classify: Callable[[RecordBatch], Verdict], config: RoutingConfig, telemetry: Telemetry) -> None:
        self._classify = classify
        self._timeout_s = config.timeout_s
        self._telemetry = telemetry
        self._threads = ThreadPoolExecutor(config.threads, thread_name_prefix="classify")
        # One waits here for a thread, without its time running, for as long as threads come back.
        self._free = asyncio.Semaphore(config.threads)

    async def parts(self, batch: RecordBatch) -> Parts:
        """The parts of a batch; wholly local when it could not be classified in time. Does not raise."""
        if not batch.present_count:
            return route(batch, IN_DOUBT)
        async with self._free:
            deciding = asyncio.get_running_loop().run_in_executor(self._threads, self._decide, batch)
            try:
                return await asyncio.wait_for(deciding, self._timeout_s)
            except TimeoutError:
                return await self._keep(batch, "timeout")
            except Exception as error:  # noqa: BLE001 - whatever it is, the batch stays
                return await self._keep(batch, type(error).__name__)

    def close(self) -> None:
        """Ends the threads; does not wait for one that is busy."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _decide(self, batch: RecordBatch) -> Parts:
        return route(batch, self._classify(batch))

    async def _keep(self, batch: RecordBatch, reason: str) -> Parts:
        self._telemetry.emit(IN_DOUBT_KEPT, reason=reason, device=batch.device_id, stream=batch.stream)
        return await asyncio.to_thread(route, batch, IN_DOUBT)
