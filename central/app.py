"""Central as one process: the services of its roles, composed and run until a signal.

Order of draining: intake and analysis (they take from Kafka), the feed, then what they use: the engine, the writer.
Waiting: the topics are made (and Kafka waited for, with back-off) before anything reads them; the feed listens at once
and answers UNAVAILABLE until it can serve; `/readyz` names what is not ready yet.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from central.config import CentralConfig
from sluice.kafka_client import ensure_topics
from sluice.service import Service, serve
from sluice.telemetry import Telemetry

if TYPE_CHECKING:
    from central.analysis import Analysis
    from central.feed import Feed
    from engine.service import Engine
    from sluice.kafka import KafkaWriter


async def run(
    config: CentralConfig,
    stop: asyncio.Event | None = None,
    *,
    handle_signals: bool = True,
    read_again: Callable[[], CentralConfig] | None = None,
) -> None:
    """Runs the configured roles until SIGTERM, SIGINT or `stop`.

    Args:
        config: of the process.
        stop: set it to end.
        handle_signals: whether to listen to signals.
        read_again: reads the configuration anew, for SIGHUP; None: SIGHUP is not listened to.

    Raises:
        ConfigError: a port is taken, a file is missing, a model is not there.
        Exception: the first error of a service, after the others were drained.
    """
    telemetry = Telemetry("central", config.telemetry)
    services = compose(config, telemetry, read_again)
    telemetry.listen()
    try:
        await serve(
            services, telemetry, drain_deadline_s=config.drain_deadline_s, stop=stop, handle_signals=handle_signals
        )
    finally:
        telemetry.close()


def compose(
    config: CentralConfig, telemetry: Telemetry, read_again: Callable[[], CentralConfig] | None = None
) -> list[Service]:
    """The services of the roles, in the order of draining, with their conditions in `/readyz`."""
    topics = Topics(config, telemetry)
    telemetry.ready_when("kafka", topics.ready.is_set)
    services: list[Service] = []
    last: list[Service] = []
    if "lake" in config.roles:
        from central.intake import LakeIntake

        intake = LakeIntake(config.kafka, config.lake, telemetry, limits=config.limits)
        services.append(After(intake, topics.ready))
    engine: EngineService | None = None
    if "analysis" in config.roles or ("feed" in config.roles and config.feed.analyze):
        engine = _engine(config, telemetry)
        if read_again is not None:
            services.append(_reload(engine, read_again, telemetry))
        last.append(engine)
    if "analysis" in config.roles:
        assert engine is not None
        analysis, writer = _analysis(config, telemetry, engine)
        services.append(After(analysis, topics.ready, engine.started))
        last.append(writer)
    if "feed" in config.roles:
        services.append(_feed(config, telemetry, engine if config.feed.analyze else None))
    return [*services, topics, *last]


class Topics:
    """Makes the topics that are missing, waiting for Kafka; `ready` is set then."""

    name: Final = "topics"

    def __init__(self, config: CentralConfig, telemetry: Telemetry) -> None:
        self.ready = asyncio.Event()
        self._config = config
        self._telemetry = telemetry
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """See `Service`."""
        making = asyncio.create_task(ensure_topics(self._config.kafka, self._telemetry, self._config.topics))
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({making, stop}, return_when=asyncio.FIRST_COMPLETED)
            if making.done():
                making.result()
                self.ready.set()
            await self._stop.wait()
        finally:
            making.cancel()
            stop.cancel()

    async def drain(self, deadline_s: float) -> None:
        """See `Service`."""
        self._stop.set()


class EngineService:
    """The engine's life; `started` is set when the model is loaded."""

    name: Final = "engine"

    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self.started = asyncio.Event()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """See `Service`."""
        if self._stop.is_set():
            return
        await self.engine.start()
        self.started.set()
        await self._stop.wait()

    async def drain(self, deadline_s: float) -> None:
        """See `Service`."""
        self._stop.set()
        # Closing takes time, too: the caches, and what streams usually say, which is saved.
        await self.engine.drain(deadline_s / 2)


class After:
    """A service that begins when its conditions hold, and may be drained before."""

    def __init__(self, service: Service, *conditions: asyncio.Event) -> None:
        self.name = service.name
        self._service = service
        self._conditions = conditions
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """See `Service`."""
        holding = asyncio.create_task(self._hold())
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({holding, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            holding.cancel()
            stop.cancel()
        if not self._stop.is_set():
            await self._service.run()

    async def drain(self, deadline_s: float) -> None:
        """See `Service`."""
        self._stop.set()
        await self._service.drain(deadline_s)

    async def _hold(self) -> None:
        for condition in self._conditions:
            await condition.wait()


def _engine(config: CentralConfig, telemetry: Telemetry) -> EngineService:
    from engine.service import Engine

    engine = EngineService(Engine(config.engine, telemetry))
    telemetry.ready_when("engine", lambda: engine.engine.ready)
    return engine


def _reload(engine: EngineService, read_again: Callable[[], CentralConfig], telemetry: Telemetry) -> Service:
    from engine.reload import ModelReload

    return ModelReload(engine.engine, lambda: read_again().engine, telemetry)


def _analysis(config: CentralConfig, telemetry: Telemetry, engine: EngineService) -> "tuple[Analysis, KafkaWriter]":
    from central.analysis import Analysis
    from sluice.kafka import KafkaWriter

    writer = KafkaWriter(
        config.kafka, telemetry, client_id="sluice-analysis", message_bytes_max=config.topics.message_bytes_max
    )
    analysis = Analysis(config.analysis, config.kafka, config.limits, engine.engine, writer, telemetry)
    telemetry.ready_when("analysis", lambda: analysis.ready)
    return analysis, writer


def _feed(config: CentralConfig, telemetry: Telemetry, engine: EngineService | None) -> "Feed":
    from central.feed import Feed

    analyzer = engine.engine if engine else None
    feed = Feed(config.feed, config.kafka, config.limits, config.state_dir, telemetry, analyzer)
    telemetry.ready_when("feed", lambda: feed.ready)
    return feed
