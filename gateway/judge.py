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
        self._threads_max = config.threads
        self._late = 0
        self._returned = asyncio.Event()
        # One waits here for a thread, without its time running, for as long as threads come back.
        self._free = asyncio.Semaphore(config.threads)

    async def parts(self, batch: RecordBatch) -> Parts:
        """The parts of a batch; wholly local when it could not be classified in time. Does not raise."""
        if not batch.present_count:
            return route(batch, IN_DOUBT)
        async with self._free:
            try:
                return await self._decided(batch)
            except TimeoutError:
                return await self._keep(batch, "timeout")
            except Exception as error:  # noqa: BLE001 - whatever it is, the batch stays
                return await self._keep(batch, type(error).__name__)

    def close(self) -> None:
        """Ends the threads; does not wait for one that is busy."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _decided(self, batch: RecordBatch) -> Parts:
        async with asyncio.timeout(self._timeout_s):
            # A late thread still has its batch. Nothing is queued behind it: what is queued cannot be taken back, so
            # with threads that never return the queue would grow for ever.
            while self._late >= self._threads_max:
                self._returned.clear()
                await self._returned.wait()
            deciding = asyncio.wrap_future(self._threads.submit(self._decide, batch))
            try:
                return await asyncio.shield(deciding)
            finally:
                if not deciding.done():
                    self._late += 1
                    deciding.add_done_callback(self._came_back)

    def _came_back(self, decided: "asyncio.Future[Parts]") -> None:
        self._late -= 1
        self._returned.set()
        if not decided.cancelled():
            decided.exception()  # asked for, since nobody waits for it any more

    def _decide(self, batch: RecordBatch) -> Parts:
        return route(batch, self._classify(batch))

    async def _keep(self, batch: RecordBatch, reason: str) -> Parts:
        self._telemetry.emit(IN_DOUBT_KEPT, reason=reason, device=batch.device_id, stream=batch.stream)
        return await asyncio.to_thread(route, batch, IN_DOUBT)
