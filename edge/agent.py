"""The agent: sources -> intake (batcher) -> spool -> uplink, as one process or inside another program.

Drain: stop the sources -> close the open batches -> make them durable -> wait, within the deadline, for the gateway's
acknowledgements -> final status -> close. What is not acknowledged stays in the spool for the next start.

    with Agent.connect("mqtt://broker:1883", device_id="press-7", site="plant-2", spool="/var/lib/press") as agent:
        agent.emit("vibration", Record(event_time_us=..., metrics={"rms": 0.7}))   # durable when it returns
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any, Self

from prometheus_client import ProcessCollector

from edge.config import AgentConfig, validate
from edge.intake import Intake
from edge.records import Chunk, StreamKey, declare_expired, serialize
from edge.sources.base import ChunkSource, SourceContext, make_source
from edge.uplink import Uplink
from edge.urls import parse_broker
from sluice.config import load
from sluice.delivery import Delivery
from sluice.errors import Backpressure, Permanent, Retryable
from sluice.record import Record, Sensitivity, validate_name
from sluice.service import Service, serve
from sluice.spool import Spool
from sluice.telemetry import Event, Telemetry

READY = Event(name="agent_ready", unit="agents", help="Agents that opened their spool and took up work.")
DRAINED = Event(name="agent_drained", unit="agents", help="Agents that ended.")
SOURCE_ENDED = Event(name="source_ended", unit="sources", help="Sources that came to their end.", labels=("source",))


class Sources:
    """Pumps all sources into the intake. A `sluice.service.Service`."""

    name = "sources"

    def __init__(self, sources: list[ChunkSource], intake: Intake, telemetry: Telemetry) -> None:
        self._sources = sources
        self._intake = intake
        self._telemetry = telemetry
        self._room = asyncio.Event()
        self._drained = asyncio.Event()
        self.exhausted = asyncio.Event()

    async def run(self) -> None:
        """Works until drained, also when all sources have ended."""
        pumps = [asyncio.create_task(self._pump(source), name=source.name) for source in self._sources]
        try:
            for pump in asyncio.as_completed(pumps):
                await pump
            self.exhausted.set()
            await self._drained.wait()
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def drain(self, deadline_s: float) -> None:
        """Ends all sources."""
        for source in self._sources:
            source.stop()
        self._drained.set()
        self._room.set()

    async def _pump(self, source: ChunkSource) -> None:
        async with contextlib.aclosing(source.deliveries()) as deliveries:
            async for delivery in deliveries:
                if not await self._submit(delivery):
                    return
                # A source that is always ready must not keep the loop from everything else.
                await asyncio.sleep(0)
        self._telemetry.emit(SOURCE_ENDED, source=source.name)

    async def _submit(self, delivery: Delivery[Chunk]) -> bool:
        """Hands a delivery to the intake, when that has room; returns False when the agent ends before."""
        loop = asyncio.get_running_loop()

        def on_loop(error: Exception | None) -> None:
            self._room.set()
            if error is None:
                delivery.ack()
            else:
                delivery.nack(error)

        def done(error: Exception | None) -> None:
            # A closed loop means that the process is ending.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(on_loop, error)

        while not self._drained.is_set():
            self._room.clear()
            try:
                self._intake.submit(delivery.batch, done)
            except Backpressure as pressure:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pressure.retry_after_s):
                        await self._room.wait()
            else:
                return True
        delivery.nack(Retryable("the agent is stopping"))
        return False


class IntakeService:
    """The intake's thread as a `sluice.service.Service`."""

    name = "intake"

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._ended = asyncio.Event()

    async def run(self) -> None:
        """Works until drained.

        Raises:
            Exception: what made the spool refuse for good.
        """
        loop = asyncio.get_running_loop()

        def tell() -> None:
            loop.call_soon_threadsafe(self._ended.set)

        self._intake.on_failure(tell)
        await self._ended.wait()
        if self._intake.failure is not None:
            raise self._intake.failure

    async def drain(self, deadline_s: float) -> None:
        """Makes durable what was taken."""
        await asyncio.to_thread(self._intake.close, deadline_s / 2)
        self._ended.set()


class Agent:
    """See the module's docstring.

    Args:
        config: everything.
        telemetry: made from `config.telemetry` when None.

    Raises:
        ConfigError: the configuration, the spool's directory or the port of the telemetry is wrong or taken.
    """

    def __init__(self, config: AgentConfig, telemetry: Telemetry | None = None) -> None:
        self.config = validate(config)
        self.telemetry = telemetry or Telemetry("edge", config.telemetry)
        declare = declare_expired(config.device_id, config.site, config.limits)
        self.spool = Spool(
            config.spool,
            owner=f"{config.site}/{config.device_id}",
            declare=declare,
            telemetry=self.telemetry,
            item_records_max=config.limits.records_per_batch_max,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._uplink: Uplink | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._outcome: Future[None] = Future()
        self._ready = threading.Event()
        self._intake = Intake(config, self.spool, self.telemetry, time.monotonic, self._appended)
        self._intake.start()

    @classmethod
    def connect(cls, broker: str, *, device_id: str, site: str, spool: str, **sections: Any) -> "Agent":
        """An agent from a few words.

        Args:
            broker: `mqtt://[user@]host[:port]` or `mqtts://...`.
            device_id: name of this device.
            site: name of its site.
            spool: directory of its spool.
            sections: further keys of the configuration, such as `telemetry={"port": 0}`.
        """
        tree = {"device_id": device_id, "site": site, "mqtt": parse_broker(broker), "spool": {"directory": spool}}
        return cls(load(AgentConfig, environ={}, overrides={**tree, **sections}))

    # --- as a library

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Runs the agent on a thread of its own; returns when it works."""
        assert self._thread is None, "an agent is started once"
        self._thread = threading.Thread(target=self._run_thread, name="agent", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._outcome.done():
            self._outcome.result()

    def stop(self) -> None:
        """Drains, and returns when everything is closed.

        Raises:
            Exception: the first error that ended the agent.
        """
        if self._thread is None:
            self._close()
            return
        if self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop.set)
        self._outcome.result()

    def emit(
        self,
        stream: str,
        records: Record | Iterable[Record],
        *,
        sensitivity: Sensitivity = Sensitivity.UNSPECIFIED,
        priority: int = 5,
        timeout_s: float | None = None,
    ) -> None:
        """Accepts records: durable when it returns, all of them or none.

        Thread-safe. It takes `batch.commit_delay_s` plus an fsync, which callers in other threads share; many records
        in one call share it too. It blocks while the spool is full.

        Args:
            stream: their stream.
            records: one or several.
            sensitivity: as declared by the caller.
            priority: 0 to 9; higher is sent first.
            timeout_s: how long to wait; None: as long as it takes.

        Raises:
            RecordRefused: a record breaks a limit; none was accepted.
            Backpressure: the spool is full, or the agent is stopping; none was accepted.
            Retryable: not durable within `timeout_s`; it may become so later.
        """
        validate_name("stream", stream)
        if not 0 <= priority <= 9:
            raise Permanent(f"priority {priority} is not 0 to 9")
        batch = [records] if isinstance(records, Record) else list(records)
        if not batch:
            return
        frames = [serialize(record, self.config.limits) for record in batch]
        oldest = min(record.event_time_us for record in batch)
        durable: Future[None] = Future()

        def done(error: Exception | None) -> None:
            if error is None:
                durable.set_result(None)
            else:
                durable.set_exception(error)

        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._intake.submit_wait(
            Chunk(StreamKey(stream, sensitivity, priority), frames, oldest, urgent=True), done, timeout_s
        )
        try:
            durable.result(None if deadline_s is None else max(0.0, deadline_s - time.monotonic()))
        except TimeoutError as error:
            raise Retryable(f"not durable within {timeout_s} s") from error

    # --- as a process

    async def run(
        self, *, stop: asyncio.Event | None = None, handle_signals: bool = True, exit_when_drained: bool = False
    ) -> None:
        """Works until SIGTERM, SIGINT or `stop`, or, with `exit_when_drained`, until all is acknowledged."""
        self._loop = asyncio.get_running_loop()
        self._stop = stop = stop or asyncio.Event()
        uplink = self._uplink = Uplink(self.config, self.spool, self.telemetry, on_settled=self._intake.settled)
        sources = Sources(self._make_sources(), self._intake, self.telemetry)
        services: list[Service] = [sources, IntakeService(self._intake), uplink]
        watch = asyncio.create_task(self._stop_when_drained(sources, uplink, stop)) if exit_when_drained else None
        try:
            # Memory and CPU of this process, on /metrics.
            ProcessCollector(registry=self.telemetry.registry)
            self.telemetry.ready_when("broker", lambda: uplink.connected)
            port = self.telemetry.listen()
            await serve(
                services,
                self.telemetry,
                drain_deadline_s=self.config.drain_deadline_s,
                stop=stop,
                handle_signals=handle_signals,
                on_ready=lambda: self._announce(port),
            )
        finally:
            if watch is not None:
                watch.cancel()
            await asyncio.to_thread(self._close)

    def _make_sources(self) -> list[ChunkSource]:
        context = SourceContext(self.config.limits, self.telemetry, self.spool.cursors())
        return [make_source(section, context) for section in self.config.sources]

    async def _stop_when_drained(self, sources: Sources, uplink: Uplink, stop: asyncio.Event) -> None:
        await sources.exhausted.wait()
        await asyncio.to_thread(self._intake.flush)
        await uplink.wait_drained()
        stop.set()

    def _announce(self, telemetry_port: int | None) -> None:
        config = self.config
        self.telemetry.emit(
            READY,
            device_id=config.device_id,
            site=config.site,
            broker=f"{config.mqtt.host}:{config.mqtt.port}",
            spool=config.spool.directory,
            spool_id=self.spool.spool_id.hex(),
            next_sequence=self.spool.next_sequence,
            spool_records=self.spool.depth.records,
            telemetry_port=telemetry_port,
        )
        self._ready.set()

    def _appended(self) -> None:
        """Runs on the intake's thread."""
        loop, uplink = self._loop, self._uplink
        if loop is not None and uplink is not None:
            # A closed loop means that the process is ending.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(uplink.appended)

    def _run_thread(self) -> None:
        try:
            asyncio.run(self.run(handle_signals=False))
        except BaseException as error:  # noqa: BLE001 - `stop` raises it in the caller's thread
            self._outcome.set_exception(error)
        else:
            self._outcome.set_result(None)
        finally:
            self._ready.set()

    def _close(self) -> None:
        self._intake.close(self.config.drain_deadline_s)
        self.telemetry.close()
        records, items, _ = self.spool.depth
        self.telemetry.emit(DRAINED, next_sequence=self.spool.next_sequence, spool_records=records, spool_items=items)
        self.spool.close()
