"""Follows a sealed table: hands each new row to a handler once it is durable, and remembers durably how far it got.

Invariants:
  * The place is saved after the handler returned, so a crash repeats at most what was under way: handlers are
    idempotent.
  * A failing handler delays only itself: it is called again with full jitter, the table goes on growing.
  * Bounded: one file is read at a time.

How it fails: it does not; every error is an event and a retry. A damaged file is an event and is passed over.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.sealed_table import SealedTable, saved_position, write_durably
from sluice.backoff import Backoff
from sluice.errors import Backpressure, Permanent, SluiceError
from sluice.telemetry import Event, Telemetry

if TYPE_CHECKING:
    import pyarrow as pa

RETRIED = Event(
    name="sealed_follow_retried",
    unit="times",
    help="Times that following the sealed store (analysis, publishing) failed and is tried again.",
    labels=("follower", "error"),
    level="warning",
)
PASSED_OVER = Event(
    name="sealed_follow_passed_over",
    unit="files",
    help="Sealed files that a follower could not read and passed over; the file is kept.",
    labels=("follower",),
    level="error",
)


class Follower:
    """A service (`sluice.service`).

    Args:
        name: for logs, metrics and the file that keeps its place.
        table: what is followed.
        columns: those the handler wants; `commit` is always among them.
        handle: takes new rows, in order of commit; idempotent.
        directory: where the place is kept.
        telemetry: for events.
        poll_interval_s: how often it looks unasked.
        retry_delay_s_max: longest back-off.
    """

    def __init__(
        self,
        name: str,
        table: SealedTable,
        columns: Sequence[str],
        handle: "Callable[[pa.Table], Awaitable[None]]",
        directory: Path,
        telemetry: Telemetry,
        *,
        poll_interval_s: float,
        retry_delay_s_max: float,
    ) -> None:
        self._name = name
        self._table = table
        self._columns = [*dict.fromkeys([*columns, "commit"])]
        self._handle = handle
        self._path = directory / f"{name}.json"
        self._telemetry = telemetry
        self._poll_interval_s = poll_interval_s
        self._backoff = Backoff(min(0.2, retry_delay_s_max), retry_delay_s_max)
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()
        # Without a place from the beginning: handlers are idempotent.
        self.position = saved_position(self._path)

    @property
    def name(self) -> str:
        """See `Service`."""
        return self._name

    def wake(self) -> None:
        """Says that there is something new. On the event loop's thread."""
        self._wake.set()

    async def run(self) -> None:
        """Follows until drained."""
        work = asyncio.create_task(self._follow(), name=self._name)
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            work.cancel()
            (outcome,) = await asyncio.gather(work, return_exceptions=True)
        if isinstance(outcome, Exception):
            raise outcome

    async def drain(self, deadline_s: float) -> None:
        """Stops; what was under way is repeated at the next start. Idempotent."""
        self._stopping.set()

    async def _follow(self) -> None:
        while True:
            self._wake.clear()
            try:
                while await self._step():
                    self._backoff.reset()
            except Exception as error:  # noqa: BLE001 - whatever fails here must not stop the site; it is tried again
                # Only our own errors never quote what was read; another library's may, and logs may leave the site.
                detail = str(error) if isinstance(error, SluiceError) else ""
                self._telemetry.emit(RETRIED, follower=self._name, error=type(error).__name__, detail=detail)
                await asyncio.sleep(error.retry_after_s if isinstance(error, Backpressure) else self._backoff.next_s())
                continue
            await self._wait()

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(self._poll_interval_s):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _step(self) -> bool:
        """Handles the next file; returns whether there was one."""
        import pyarrow.compute as pc

        try:
            read = await asyncio.to_thread(next, self._table.scan(self.position, self._columns), None)
        except Permanent as error:
            await self._pass_over(error)
            return True
        if read is None:
            return False
        file, rows = read
        new = rows.filter(pc.greater(rows.column("commit"), self.position))
        if new.num_rows:
            await self._handle(new)
        await self._save(file.last)
        return True

    async def _pass_over(self, error: Permanent) -> None:
        file = next(f for f in await asyncio.to_thread(self._table.files) if f.last > self.position)
        self._telemetry.emit(PASSED_OVER, follower=self._name, file=file.name, detail=str(error))
        await self._save(file.last)

    async def _save(self, position: int) -> None:
        await asyncio.to_thread(write_durably, self._path, json.dumps({"position": position}))
        self.position = position
