"""The engine's life inside the gateway.

A model that cannot be loaded is an error that is told, and no reason to stop: records are sealed and exported without
it, and are analysed when a gateway with a working model follows the store.
"""

import asyncio
from typing import TYPE_CHECKING

from sluice.errors import SluiceError
from sluice.service import Service
from sluice.telemetry import Event, Telemetry

if TYPE_CHECKING:
    from engine.service import Engine

NOT_STARTED = Event(
    name="site_engine_not_started",
    unit="engines",
    help="Engines that could not be started; records are sealed and wait for analysis.",
    level="error",
)


class SiteEngine:
    """A service: starts the engine, then runs the analysis that needs it.

    Args:
        engine: not started yet.
        analysis: begins when the engine is ready.
        telemetry: for events.
    """

    name = "site-engine"

    def __init__(self, engine: "Engine", analysis: Service, telemetry: Telemetry) -> None:
        self._engine = engine
        self._analysis = analysis
        self._telemetry = telemetry
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """See `Service`."""
        stopping = asyncio.create_task(self._stopping.wait())
        working = asyncio.create_task(self._work())
        try:
            # Not only `working`: a model that is still loading when we are drained never says that it has ended.
            await asyncio.wait({stopping, working}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
            await stopping
        finally:
            working.cancel()
            stopping.cancel()
            await asyncio.gather(working, stopping, return_exceptions=True)

    async def drain(self, deadline_s: float) -> None:
        """See `Service`."""
        await self._analysis.drain(deadline_s / 2)
        await self._engine.drain(deadline_s / 2)
        self._stopping.set()

    async def _work(self) -> None:
        try:
            await self._engine.start()
        except SluiceError as error:
            self._telemetry.emit(NOT_STARTED, detail=str(error))
            await self._engine.opened.wait()  # by a SIGHUP, with another model
        await self._analysis.run()
