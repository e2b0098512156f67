"""SIGHUP: the configuration is read again, and models that it names otherwise are replaced without a pause.

Fails: a configuration that is not valid, or a model that cannot be loaded, is an event; the old models go on.
"""

import asyncio
import signal
from collections.abc import Callable
from typing import Final

from engine.config import EngineConfig
from engine.service import Engine
from sluice.telemetry import Event, Telemetry

RELOADED: Final = Event(name="engine_reloaded", unit="reloads", help="Configurations of models taken over.")
NOT_RELOADED: Final = Event(
    name="engine_not_reloaded", unit="reloads", help="Configurations of models that were not taken over.", level="error"
)


class ModelReload:
    """A service.

    Args:
        engine: started by somebody else.
        read: reads the engine's section anew.
        telemetry: for events.
    """

    name: Final = "model-reload"

    def __init__(self, engine: Engine, read: Callable[[], EngineConfig], telemetry: Telemetry) -> None:
        self._engine = engine
        self._read = read
        self._telemetry = telemetry
        self._wanted = asyncio.Event()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """See `Service`."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._wanted.set)
        working = asyncio.create_task(self._work())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            loop.remove_signal_handler(signal.SIGHUP)
            # Not the default, which would end the process in the midst of what is still drained.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            working.cancel()
            stopping.cancel()
            await asyncio.gather(working, stopping, return_exceptions=True)

    async def drain(self, deadline_s: float) -> None:
        """See `Service`."""
        self._stop.set()

    async def _work(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                changed = await self._engine.reload(self._read())
                self._telemetry.emit(RELOADED, models=changed)
            except Exception as error:  # noqa: BLE001 - whatever a device or a model raises, the old ones go on
                self._telemetry.emit(NOT_RELOADED, detail=str(error) or repr(error))
