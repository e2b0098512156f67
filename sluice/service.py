"""The life of a part: run, drain, end.

Drain = stop intake -> flush -> settle -> close, within a deadline. A service tolerates drain before run, and a second
drain. `serve` runs several services as one process: the first failure, SIGTERM or SIGINT drains all, in the given order
(sources first), and whatever is still running at the deadline is cancelled.
"""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Final, Protocol

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

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
# What a service gets to drain when those before it used up the deadline.
_GRACE_S: Final = 0.1


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
        Exception: the first error of a service, after the others were drained; every error is an event.
    """
    assert services, "at least one service"
    stop = stop or asyncio.Event()
    loop = asyncio.get_running_loop()
    tasks: dict[asyncio.Task[None], Service] = {}
    failures: list[Exception] = []
    late: set[asyncio.Task[None]] = set()
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        if handle_signals:
            for number in _SIGNALS:
                loop.add_signal_handler(number, stop.set)
        for service in services:
            task = asyncio.create_task(service.run(), name=service.name)
            task.add_done_callback(partial(_note_failure, service.name, telemetry, failures))
            tasks[task] = service
            telemetry.emit(STARTED, service=service.name)
        if on_ready:
            on_ready()
        await asyncio.wait({*tasks, stopping}, return_when=asyncio.FIRST_COMPLETED)
        deadline = loop.time() + drain_deadline_s
        await _drain_all(services, telemetry, deadline)
        _, late = await asyncio.wait(tasks, timeout=max(_GRACE_S, deadline - loop.time()))
    finally:
        stopping.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(stopping, *tasks, return_exceptions=True)
        if handle_signals:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
    for task in late:
        telemetry.emit(DRAIN_FAILED, service=tasks[task].name, detail="still running at the deadline")
    if failures:
        raise failures[0]


async def until_one_ends(*works: Coroutine[Any, Any, None]) -> None:
    """Runs the parts of one service together; when one ends, the others are cancelled, and an error of it is raised.

    A part that dies must not leave its service looking alive.
    """
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _note_failure(name: str, telemetry: Telemetry, failures: list[Exception], task: asyncio.Task[None]) -> None:
    """Says at once that a service failed: the drain that follows may take a while, or be cut off."""
    error = None if task.cancelled() else task.exception()
    if isinstance(error, Exception):
        failures.append(error)
        telemetry.emit(FAILED, service=name, detail=str(error) or repr(error))


async def _drain_all(services: Sequence[Service], telemetry: Telemetry, deadline: float) -> None:
    loop = asyncio.get_running_loop()
    for service in services:
        telemetry.emit(DRAINING, service=service.name)
        left_s = max(_GRACE_S, deadline - loop.time())
        try:
            async with asyncio.timeout(left_s):
                await service.drain(left_s)
        except Exception as error:  # noqa: BLE001 - one that cannot drain must not keep the others from draining
            telemetry.emit(DRAIN_FAILED, service=service.name, detail=repr(error))
