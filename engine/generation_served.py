"""The place of the model that generates text in an engine: opened, replaced while it works, closed.

Replacing: the next one is loaded beside the old one and then takes all new requests; those of the old one end on it.
For that time both are in memory. One that cannot be loaded leaves the old one in place.
"""

import asyncio

import msgspec

from engine.config import EngineConfig
from engine.failures import EngineStopped
from engine.generation import Generator
from engine.generation_stats import GenerationMeter
from engine.served import files_version
from sluice.telemetry import Telemetry


class ServedGenerator:
    """See the module's docstring. Lives on the event loop's thread; `open` and `retire` are called one at a time.

    Args:
        telemetry: for the figures of all its generators.

    Attributes:
        current: takes new requests; None when no model is configured, or none is open yet.
        config: the section that it was opened with.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self.current: Generator | None = None
        self.config = EngineConfig()
        self._meter = GenerationMeter(telemetry)
        self._alive: set[Generator] = set()  # the current one, and the one that is being retired
        self._closed = ""

    async def open(self, config: EngineConfig) -> Generator | None:
        """Opens the model as `config` has it, if it has one, in the place of the current one, which is returned.

        Raises:
            Permanent: it is not there, damaged, or generates no text.
            ConfigError: the device is not there.
            EngineStopped: closed while it was loaded.
        """
        new = Generator(config, meter=self._meter) if config.generation.model else None
        if new is not None:
            try:
                await new.start()
                self._require_open()
            except BaseException:
                await new.close()
                raise
            self._alive.add(new)
        old, self.current, self.config = self.current, new, config
        return old

    async def retire(self, old: Generator, deadline_s: float) -> None:
        """Lets the requests of one that was replaced end within `deadline_s` seconds, and closes it."""
        await old.drain(deadline_s)
        self._alive.discard(old)

    async def close(self, deadline_s: float, why: str) -> None:
        """Refuses new requests, lets those under way end within `deadline_s` seconds, and closes everything."""
        self._closed = self._closed or why
        await asyncio.gather(*(generator.drain(deadline_s) for generator in self._alive))

    async def is_other(self, config: EngineConfig) -> bool:
        """Whether it must be opened anew to be as `config` has it: also when its files have changed."""
        if _identity(config) != _identity(self.config):
            return True
        if self.current is None:
            return False
        files = msgspec.structs.replace(config, model=config.generation.model)
        version = await asyncio.to_thread(files_version, files)
        return not self.current.ready or version not in {"", self.current.model_version}

    def _require_open(self) -> None:
        if self._closed:
            raise EngineStopped(self._closed)


def _identity(config: EngineConfig) -> tuple[object, ...]:
    """What decides how text is generated; nothing when none is."""
    if not config.generation.model:
        return ()
    return config.generation, config.device, config.precision, config.threads, config.text_bytes_max
