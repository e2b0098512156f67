"""The queue that several devices work on: each takes the next batch when it is free.

So the load is shared as the devices are really fast, and nothing waits behind a slow one. What is there for
several idle devices is shared out between them.

Invariants: whatever was added is reported exactly once (an output, an error, or expired), unless it was
cancelled before its batch began. Texts whose device died are run once more, each alone, so that one that kills
devices fails alone and its neighbours do not.

The scheduler is guarded by one lock; `on_report` and `on_event` are called on the devices' threads, outside of
the lock, and must not block.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from engine.backend import DeviceLost
from engine.cost import Sample
from engine.driver import Driver, Job, Report
from engine.failures import EngineStopped
from engine.fleet import Device, DeviceEvent, DeviceStats, EventKind, Recovery
from engine.lane import Item, Priority
from engine.scheduler import Scheduler
from sluice.backoff import Backoff
from sluice.errors import Retryable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Report", "Runner"]


class Runner:
    """Drives devices from one queue. `run` is the body of the first device's thread; the others get their own.

    Args:
        devices: at least one; owned by this object while it runs.
        scheduler: owned by this object from now on.
        on_report: takes each report.
        on_event: takes what happens to devices.
        recovery: of devices that die.
        clock: monotonic seconds, the one that items' times are on.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        scheduler: Scheduler,
        on_report: Callable[[Report], None],
        *,
        on_event: Callable[[DeviceEvent], None] = lambda _: None,
        recovery: Recovery | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert devices, "a runner needs a device"
        self.stopping = False
        self._devices = tuple(devices)
        self._scheduler = scheduler
        self._on_report = on_report
        self._on_event = on_event
        self._recovery = recovery or Recovery()
        self._clock = clock
        self._rows: dict[int, npt.NDArray[np.int32]] = {}  # token ids of what waits
        self._changed = threading.Condition()
        self._idle = 0
        self._refusing = ""
        self._none_since_s = float("inf")  # since when no device is alive
        self._crash: BaseException | None = None
        self._rate()

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait."""
        return self._scheduler.queued_tokens

    @property
    def crowded_out(self) -> bool:
        """See `Scheduler.crowded_out`."""
        return self._scheduler.crowded_out

    @property
    def busy_s(self) -> float:
        """Time that the devices computed, added up."""
        return sum(device.busy_s for device in self._devices)

    def devices(self) -> tuple[DeviceStats, ...]:
        """Figures of each device."""
        return tuple(device.snapshot() for device in self._devices)

    def admit(self, priority: Priority) -> None:
        """Asks whether there is room for anything.

        Raises:
            Backpressure: the queue is full.
            Retryable: the engine is stopping, or has had no device for too long.
        """
        with self._changed:
            self._require_running()
            self._scheduler.admit(1, priority)

    def add(self, items: Sequence[Item], rows: "Sequence[npt.NDArray[np.int32]]") -> None:
        """Accepts all items with their token ids, or none.

        Raises:
            Backpressure: the queue is full.
            Retryable: the engine is stopping, or has had no device for too long.
        """
        with self._changed:
            self._require_running()
            self._scheduler.add(items)
            self._rows.update((item.id, row) for item, row in zip(items, rows, strict=True))
            self._changed.notify_all()

    def cancel(self, item_ids: Sequence[int]) -> list[int]:
        """Drops those of the items that still wait, and returns them; they are not reported."""
        with self._changed:
            dropped = [item_id for item_id in item_ids if self._scheduler.cancel(item_id)]
            for item_id in dropped:
                del self._rows[item_id]
        return dropped

    def promote(self, item_id: int, priority: Priority, deadline_s: float) -> None:
        """See `Scheduler.promote`."""
        with self._changed:
            self._scheduler.promote(item_id, priority, deadline_s)

    def stop(self) -> None:
        """Ends `run` after the batches under way; what still waits is reported as an error. Idempotent.

        A device that is being opened anew is not waited for.
        """
        with self._changed:
            self.stopping = True
            self._changed.notify_all()
        for device in self._devices:
            if device.reopen is not None:
                device.reopen.cancel()

    def _require_running(self) -> None:
        if self.stopping or self._refusing:
            raise Retryable(self._refusing or "the engine is stopping")

    def run(self) -> None:
        """Works until stopped, or until no device is left that could be brought back.

        Raises:
            Retryable: no device is left.
            Exception: a driver's own failure, a bug; the others were stopped.
        """
        others = [
            threading.Thread(target=self._drive, args=(device,), name=f"engine-{device.name}", daemon=True)
            for device in self._devices[1:]
        ]
        for thread in others:
            thread.start()
        self._drive(self._devices[0])
        for thread in others:
            thread.join()
        left_alone = not self.stopping
        self.stop()
        self._abandon("the engine stopped")
        if self._crash is not None:
            raise self._crash
        if left_alone:
            raise Retryable("no device is left: all of them died and cannot be opened anew")

    def _drive(self, device: Device) -> None:
        backoff = Backoff(self._recovery.first_s, self._recovery.max_s)
        try:
            Driver(device, self, backoff, self._clock, self._recovery.memory_wait_s_max).run()
        except BaseException as error:  # noqa: BLE001 - `run` raises it, whichever thread it was
            self._crash = self._crash or error
            self.stop()

    def take(self, device: Device, *, wait: bool) -> Job | None:
        """See `Source`.

        Raises:
            DeviceLost: the device died while it waited.
        """
        with self._changed:
            while wait and not (self.stopping or device.died or len(self._scheduler)):
                self._idle += 1
                self._changed.wait()
                self._idle -= 1
            if self.stopping:
                return None
            if device.died:
                raise DeviceLost("it ended while it had nothing to do")
            terms = device.terms(self._scheduler.queued_tokens, self._idle + 1)
            assignment = self._scheduler.next_batch(self._clock(), terms)
            rows = [self._rows.pop(item.id) for item in assignment.batch]
            expired = tuple(item.id for item in assignment.expired)
            for item_id in expired:
                del self._rows[item_id]
        if expired:
            self._on_report(Report(expired=expired))
        return Job(assignment.batch, rows, assignment.length) if rows else None

    def give_back(self, job: Job, report: Report, why: DeviceLost) -> None:
        """See `Source`: each text gets one more try, alone."""
        retried = []
        for item in job.items:
            if item.id in report.outputs:
                continue
            if item.alone:
                report.outputs[item.id] = Retryable(f"a device died on this text, and another one before: {why}")
            else:
                retried.append(item)
        rows = {item.id: row for item, row in zip(job.items, job.rows, strict=True)}
        with self._changed:
            self._scheduler.retry(retried)
            self._rows.update((item.id, rows[item.id]) for item in retried)
            self._changed.notify_all()
        if report.outputs:
            report.rows = len(report.outputs)
            report.tokens = sum(len(rows[item_id]) for item_id in report.outputs)
            report.padded_tokens = max(report.padded_tokens, report.tokens)
            self._on_report(report)

    def report(self, report: Report) -> None:
        """See `Source`."""
        self._on_report(report)

    def observe(self, device: Device, sample: Sample) -> None:
        """See `Source`."""
        with self._changed:
            if device.costs.observe(sample):
                self._scheduler.cost = device.costs.model
                self._rate()

    def wake(self) -> None:
        """See `Source`."""
        with self._changed:
            self._changed.notify_all()

    def pause(self, seconds: float) -> bool:
        """See `Source`; meanwhile, the time without any device may run out."""
        end_s = time.monotonic() + seconds
        while not self.stopping and (left_s := end_s - time.monotonic()) > 0:
            self._check_down()
            with self._changed:
                if self._none_since_s < float("inf") and not self._refusing:
                    left_s = min(left_s, max(0.0, self._none_since_s + self._recovery.gone_s_max - self._clock()))
                if not self.stopping:
                    self._changed.wait(left_s)
        self._check_down()
        return not self.stopping

    def tell(self, kind: EventKind, device: Device, detail: str) -> None:
        """See `Source`."""
        with self._changed:
            self._rate()
            none = not any(each.alive for each in self._devices)
            self._none_since_s = min(self._none_since_s, self._clock()) if none else float("inf")
            back = bool(self._refusing) and not none
            if back:
                self._refusing = ""
        self._on_event(DeviceEvent(kind, device.name, detail))
        if back:
            self._on_event(DeviceEvent("up", device.name))
        if kind == "lost" and none and all(each.reopen is None for each in self._devices):
            self._go_down("all of them died and cannot be opened anew")
        self._check_down()

    def _check_down(self) -> None:
        none_s = self._clock() - self._none_since_s
        if none_s >= self._recovery.gone_s_max and not self._refusing:
            self._go_down(f"none for {none_s:.0f} s")

    def _go_down(self, why: str) -> None:
        """No device: refuses calls, and does not let anybody wait for nothing."""
        with self._changed:
            if self._refusing or self.stopping:
                return
            self._refusing = f"no device is left to run on: {why}"
        self._on_event(DeviceEvent("down", "", why))
        self._abandon(self._refusing)

    def _rate(self) -> None:
        """Keeps the scheduler informed of how fast all devices are together."""
        rate = sum(device.tokens_per_s for device in self._devices if device.alive)
        if rate > 0:
            self._scheduler.token_s = 1 / rate

    def _abandon(self, why: str) -> None:
        """Reports what still waits."""
        with self._changed:
            left = list(self._rows)
            for item_id in left:
                self._scheduler.cancel(item_id)
            self._rows.clear()
        if left:
            self._on_report(Report(outputs={item_id: EngineStopped(why) for item_id in left}))
