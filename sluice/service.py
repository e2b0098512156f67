"""The life of a part: run, drain, end.

Drain = stop intake -> flush -> settle -> close, within a deadline. A service tolerates drain before run, and a second
drain. `serve` runs several services as one process: the first failure, SIGTERM or SIGINT drains all, in the given order
(sources first), and whatever is still running at the deadline is cancelled.
"""

import asyncio
import signal
from collections.abc import Callable, Sequence
from typing import Protocol

from sluice.telemetry import Event, Telemetry

STARTED = Event(name="service_started", unit="services", help="Services started.", labels=("service",))
DRAINING = Event(name="service_draining", unit="services", help="Services asked to drain.", labels=("service",))
DRAIN_FAILED = Event(
    name="service_drain_failed",
    unit="services",
    help="Services that failed while draining, or were cut off at the deadline.",
    labels=("service",),
    level="error",
)
FAILED = Event(
    name="service_failed",
    unit="services",
    help="Services that ended with an error.",
    labels=("service",),
    level="error",
)


class Service(Protocol):
    """One running part of a process."""

    @property
    def name(self) -> str:
        """Short name, for logs and metrics."""
        ...

    async def run(self) -> None:
        """Works until drained; returns then. An error ends the process."""
        ...

    async def drain(self, deadline_s: float) -> None:
        """Stops intake, flushes, settles and closes within `deadline_s` seconds; `run` returns afterwards."""
        ...


async def serve(
    services: Sequence[Service],
    telemetry: Telemetry,
    *,
    drain_deadline_s: float,
    stop: asyncio.Event | None = None,
    handle_signals: bool = True,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Runs services until one ends, `stop` is set, or SIGTERM or SIGINT arrives; then drains all of them.

    Args:
        services: in the order of draining: sources first, so that nothing new arrives while the rest is flushed.
        telemetry: for the life-cycle events.
        drain_deadline_s: for the whole drain, in seconds.
        stop: set it to end (tests, supervisors).
        handle_signals: install handlers for SIGTERM and SIGINT.
        on_ready: called when all services were started.

    Raises:
        Exception: the first error of a service, after the others were drained.
    """
    stop = stop or asyncio.Event()
    loop = asyncio.get_running_loop()
    if handle_signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
    tasks: dict[asyncio.Task[None], Service] = {}
    for service in services:
        tasks[asyncio.create_task(service.run(), name=service.name)] = service
        telemetry.emit(STARTED, service=service.name)
    if on_ready:
        on_ready()
    late: set[asyncio.Task[None]] = set()
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait({*tasks, stopping}, return_when=asyncio.FIRST_COMPLETED)
        await _drain_all(services, telemetry, loop.time() + drain_deadline_s)
        _, late = await asyncio.wait(tasks, timeout=max(0.1, drain_deadline_s))
    finally:
        stopping.cancel()
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for task in late:
        telemetry.emit(DRAIN_FAILED, service=tasks[task].name, detail="still running at the deadline")
    for service, outcome in zip(services, outcomes, strict=True):
        if isinstance(outcome, Exception):
            telemetry.emit(FAILED, service=service.name, detail=str(outcome))
            raise outcome


async def _drain_all(services: Sequence[Service], telemetry: Telemetry, deadline: float) -> None:
    loop = asyncio.get_running_loop()
    for service in services:
        telemetry.emit(DRAINING, service=service.name)
        left_s = max(0.1, deadline - loop.time())
        try:
            async with asyncio.timeout(left_s):
                await service.drain(left_s)
        except Exception as error:  # noqa: BLE001 - one that cannot drain must not keep the others from draining
            telemetry.emit(DRAIN_FAILED, service=service.name, detail=repr(error))
