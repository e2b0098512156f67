"""The thread that keeps the device busy: takes batches from the scheduler, runs them, hands out results.

Invariants: whatever was added is reported exactly once (an output, an error, or expired), unless it was
cancelled before its batch began; a batch that fails is split until the text that fails is alone, so that it
fails alone; out of memory first gives back what the allocator holds, lowers the limit, and splits.

The scheduler is guarded by one lock; `on_report` is called on this thread, outside of the lock.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.backend import Backend, DeviceOutOfMemory
from engine.cost import CostTracker
from engine.lane import Item, Priority
from engine.memory import Admission
from engine.scheduler import Scheduler
from sluice.errors import Retryable, SluiceError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Row = npt.NDArray[np.floating[Any]]


@dataclass(slots=True)
class Report:
    """What became of a batch.

    Attributes:
        outputs: per item id, a row or what went wrong with that item alone.
        expired: ids whose deadline passed while they waited.
        rows: texts computed.
        length: padded length in tokens.
        tokens: real tokens.
        padded_tokens: tokens computed.
        seconds: device time.
        splits: times a batch was split after a failure.
    """

    outputs: "dict[int, Row | Exception]" = field(default_factory=dict)
    expired: tuple[int, ...] = ()
    rows: int = 0
    length: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    seconds: float = 0.0
    splits: int = 0


@dataclass(slots=True)
class _Job:
    items: Sequence[Item]
    rows: "Sequence[npt.NDArray[np.int32]]"
    length: int
    started_s: float
    ticket: object = None
    error: Exception | None = None


class Runner:
    """Drives one backend. `run` is the body of its thread.

    Args:
        backend: driven by the thread that calls `run` only.
        scheduler: owned by this object from now on.
        costs: refined with every batch.
        admission: the limit of memory.
        on_report: takes each report; must not block.
        clock: monotonic seconds, the one that items' times are on.
    """

    def __init__(
        self,
        backend: Backend,
        scheduler: Scheduler,
        costs: CostTracker,
        admission: Admission,
        on_report: Callable[[Report], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend = backend
        self._scheduler = scheduler
        self._costs = costs
        self._admission = admission
        self._on_report = on_report
        self._clock = clock
        self._rows: dict[int, npt.NDArray[np.int32]] = {}  # token ids of what waits
        self._changed = threading.Condition()
        self._stopping = False
        self._last_end_s = 0.0
        self.busy_s = 0.0

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait."""
        return self._scheduler.queued_tokens

    def add(self, items: Sequence[Item], rows: "Sequence[npt.NDArray[np.int32]]") -> None:
        """Accepts all items with their token ids, or none.

        Raises:
            Backpressure: the queue is full.
            Retryable: the engine is stopping.
        """
        with self._changed:
            if self._stopping:
                raise Retryable("the engine is stopping")
            self._scheduler.add(items)
            self._rows.update((item.id, row) for item, row in zip(items, rows, strict=True))
            self._changed.notify()

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
        """Ends `run` after what is under way; what still waits is reported as an error. Idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def run(self) -> None:
        """Works until stopped."""
        under_way: deque[_Job] = deque()
        while True:
            room = len(under_way) < self._backend.info.depth
            job = self._next(wait=not under_way) if room else None
            if job is not None:
                self._start(job)
                under_way.append(job)
            elif under_way:
                self._finish(under_way.popleft())
            elif self._stopping:
                break
        self._abandon()

    def _next(self, *, wait: bool) -> _Job | None:
        with self._changed:
            while wait and not self._stopping and not len(self._scheduler):
                self._changed.wait()
            if self._stopping:
                return None
            assignment = self._scheduler.next_batch(self._clock(), self._admission.tokens_max)
            items = assignment.batch
            rows = [self._rows.pop(item.id) for item in items]
            expired = tuple(item.id for item in assignment.expired)
            for item_id in expired:
                del self._rows[item_id]
        if expired:
            self._on_report(Report(expired=expired))
        if not items:
            return None
        return _Job(items, rows, self._padded(rows, assignment.length), self._clock())

    def _padded(self, rows: "Sequence[npt.NDArray[np.int32]]", edge: int) -> int:
        return max(len(row) for row in rows) if self._backend.info.exact_lengths else edge

    def _start(self, job: _Job) -> None:
        try:
            job.ticket = self._backend.submit(job.rows, job.length)
        except Exception as error:  # noqa: BLE001 - whatever a device raises concerns this batch
            job.error = error

    def _finish(self, job: _Job) -> None:
        report = Report(rows=len(job.items), length=job.length, tokens=sum(len(row) for row in job.rows))
        if self._collect(job, report):
            self._admission.succeeded()
        end_s = self._clock()
        # Batches overlap: a batch's own time begins when the one before it ended.
        report.seconds = end_s - max(job.started_s, self._last_end_s)
        self._last_end_s = end_s
        self.busy_s += report.seconds
        if not report.splits:
            self._observe(len(job.items), job.length, report.seconds)
        self._on_report(report)

    def _observe(self, rows: int, length: int, seconds: float) -> None:
        if self._costs.observe(rows, length, seconds):
            with self._changed:
                self._scheduler.cost = self._costs.model

    def _collect(self, job: _Job, report: Report) -> bool:
        """Gathers a job's outputs into the report, splitting it when it fails. True when it ran as a whole."""
        if job.error is None:
            try:
                rows = self._backend.collect(job.ticket)
                report.outputs.update((item.id, row) for item, row in zip(job.items, rows, strict=True))
            except Exception as error:  # noqa: BLE001 - as in _start
                job.error = error
            else:
                report.padded_tokens += len(job.items) * job.length
                return True
        self._recover(job, job.error, report)
        return False

    def _recover(self, job: _Job, error: Exception, report: Report) -> None:
        no_memory = isinstance(error, DeviceOutOfMemory)
        if no_memory:
            self._backend.empty_cache()
            self._admission.failed(len(job.rows) * job.length)
        if len(job.items) == 1:
            if no_memory and self._retry_alone(job, report):
                return
            report.outputs[job.items[0].id] = _described(error, job.length)
            return
        report.splits += 1
        # By length, so that the half of the shorter texts is padded less.
        order = sorted(range(len(job.rows)), key=lambda i: len(job.rows[i]))
        middle = len(order) // 2
        for part in (order[:middle], order[middle:]):
            rows = [job.rows[i] for i in part]
            half = _Job([job.items[i] for i in part], rows, self._padded(rows, job.length), job.started_s)
            self._start(half)
            self._collect(half, report)

    def _retry_alone(self, job: _Job, report: Report) -> bool:
        """A single text that did not fit is tried once more with the allocator's cache emptied."""
        try:
            (row,) = self._backend.collect(self._backend.submit(job.rows, job.length))
        except Exception:  # noqa: BLE001 - the first error is reported
            return False
        report.outputs[job.items[0].id] = row
        report.padded_tokens += job.length
        return True

    def _abandon(self) -> None:
        """Reports what still waits."""
        with self._changed:
            left = list(self._rows)
            for item_id in left:
                self._scheduler.cancel(item_id)
            self._rows.clear()
        if left:
            self._on_report(Report(outputs={item_id: Retryable("the engine stopped") for item_id in left}))


def _described(error: Exception, length: int) -> SluiceError:
    if isinstance(error, DeviceOutOfMemory):
        return Retryable(f"a text of {length} tokens does not fit into the device's memory: {error}")
    return Retryable(f"inference failed: {type(error).__name__}: {error}")
