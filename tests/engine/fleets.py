"""A runner over several devices, in this process and in others, for tests."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from engine.backend import Backend
from engine.buckets import Ladder
from engine.config import LADDER
from engine.cost import PRIOR, CostTracker
from engine.fleet import Device, DeviceEvent, Recovery
from engine.lane import Item, Priority
from engine.memory import Admission
from engine.remote import ReopenWorker, WorkerSpec, open_workers
from engine.runner import Report, Runner
from engine.scheduler import Limits, Scheduler
from tests.engine.fakes import Again, embedding

FAKE = "tests.engine.fakes:open_fake"
QUICK = Recovery(first_s=0.01, max_s=0.05, gone_s_max=20.0)


def spec(opener: str = FAKE, *, answer_s_max: float = 20.0, close_s_max: float = 5.0, **arguments: Any) -> WorkerSpec:
    return WorkerSpec(opener, arguments, start_s_max=60.0, answer_s_max=answer_s_max, close_s_max=close_s_max)


def rows(*lengths: int) -> list[np.ndarray]:  # type: ignore[type-arg]
    return [np.full(length, 2 + i % 500, np.int32) for i, length in enumerate(lengths)]


def right(outcome: object, row: np.ndarray) -> bool:  # type: ignore[type-arg]
    return isinstance(outcome, np.ndarray) and bool((outcome == embedding(row)).all())


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.005)


class Fleet:
    """A runner over several devices, with what it reported."""

    def __init__(self, devices: Sequence[Device], recovery: Recovery = QUICK, budget: int = 256) -> None:
        limits = Limits(budget, 64, 100_000, 0.25, (0.05, 0.25))
        scheduler = Scheduler(Ladder(LADDER, 64).refined(), limits, PRIOR)
        self.outcomes: dict[int, object] = {}
        self.by_device: dict[str, int] = {}
        self.events: list[DeviceEvent] = []
        self.runner = Runner(devices, scheduler, self._report, on_event=self.events.append, recovery=recovery)
        self.died: BaseException | None = None
        self._devices = devices
        self._changed = threading.Condition()

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def _report(self, report: Report) -> None:
        with self._changed:
            assert not report.outputs.keys() & self.outcomes.keys(), "reported twice"
            self.outcomes.update(report.outputs)
            self.by_device[report.device] = self.by_device.get(report.device, 0) + report.rows
            self._changed.notify_all()

    def add(self, batch: Sequence[Any], start: int = 0) -> None:
        items = [Item(start + i, len(row), Priority.BACKGROUND, time.monotonic()) for i, row in enumerate(batch)]
        self.runner.add(items, batch)

    def wait(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.outcomes) >= count, 60), f"{len(self.outcomes)} of {count}"

    @contextmanager
    def running(self) -> Iterator[None]:
        def run() -> None:
            try:
                self.runner.run()
            except BaseException as error:  # noqa: BLE001 - looked at by the test
                self.died = error

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.runner.stop()
            thread.join(60)
            assert not thread.is_alive()
            for device in self._devices:
                device.backend.close()


def device(name: str, backend: Backend, reopen: Callable[[], Backend] | None = None, budget: int = 256) -> Device:
    known = reopen if reopen is None or hasattr(reopen, "cancel") else Again(reopen)
    return Device(name, backend, CostTracker(), Admission(budget), known)


def workers(count: int, **arguments: Any) -> list[Device]:
    asked = spec(**arguments)
    return [device(f"w{i}", each, ReopenWorker(asked)) for i, each in enumerate(open_workers([asked] * count))]


def caught_in_the_middle(fifo: Path) -> int:
    """Waits until a worker says that a batch is under way; its process id."""
    return int(fifo.read_text(encoding="ascii"))


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
