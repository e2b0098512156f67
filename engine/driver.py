"""The thread of one device: takes batches from the shared queue, runs them, reports what became of them.

Invariants: whatever it took is reported or given back exactly once; a batch that fails is split until the text
that fails is alone, so that it fails alone; out of memory first gives back what the allocator holds, lowers this
device's limit, and splits; what does not fit alone either waits for memory, for a bounded time. When the device
dies, what was under way goes back to the queue, and the device is opened anew after growing pauses.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from engine.backend import DeviceLost, DeviceOutOfMemory, Mortal
from engine.cost import Sample
from engine.fleet import Device, EventKind
from engine.lane import Item
from sluice.backoff import Backoff
from sluice.errors import Retryable, SluiceError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Row = npt.NDArray[np.floating[Any]]
    Ids = npt.NDArray[np.int32]

# Asking a device for its memory may cost a round trip: every so many batches.
MEMORY_EVERY: Final = 64
# Of the pauses for memory; each is twice the one before, up to the longest.
MEMORY_PAUSE_S_FIRST: Final = 0.05
MEMORY_PAUSE_S_MAX: Final = 1.0


@dataclass(slots=True)
class Report:
    """What became of a batch.

    Attributes:
        outputs: per item id, a row or what went wrong with that item alone.
        expired: ids whose deadline passed while they waited.
        rows: texts computed.
        length: padded length in tokens; of the longest text when nothing is padded.
        tokens: real tokens.
        padded_tokens: tokens computed, those of rows that only fill a batch up too.
        seconds: device time.
        splits: times a batch was split after a failure.
        waited_s: for memory.
        device: that ran it.
    """

    outputs: "dict[int, Row | Exception]" = field(default_factory=dict)
    expired: tuple[int, ...] = ()
    rows: int = 0
    length: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    seconds: float = 0.0
    splits: int = 0
    waited_s: float = 0.0
    device: str = ""


@dataclass(slots=True)
class Job:
    """A batch under way: items, their token ids, and the length they are padded to."""

    items: Sequence[Item]
    rows: "Sequence[Ids]"
    length: int
    started_s: float = 0.0
    ticket: object = None
    error: Exception | None = None

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return sum(len(row) for row in self.rows)


class Source(Protocol):
    """Where jobs come from and reports go: the runner."""

    stopping: bool

    def take(self, device: Device, *, wait: bool) -> Job | None:
        """The next job; None when there is none, or when the runner is stopping."""

    def give_back(self, job: Job, report: Report, why: DeviceLost) -> None:
        """Takes back what the report has no outcome for."""

    def report(self, report: Report) -> None:
        """A batch is done."""

    def observe(self, device: Device, sample: Sample) -> None:
        """What a batch took."""

    def pause(self, seconds: float) -> bool:
        """Waits. False when the runner is stopping."""

    def tell(self, kind: EventKind, device: Device, detail: str) -> None:
        """Something happened to the device; `alive` says how it is."""

    def wake(self) -> None:
        """A device may have died."""


class Driver:
    """Drives one device. `run` is the body of its thread.

    Args:
        device: driven by the thread that calls `run` only.
        source: of jobs.
        backoff: between attempts to bring the device back.
        clock: monotonic seconds.
        memory_wait_s_max: time that a batch waits for memory, in all.
    """

    def __init__(
        self,
        device: Device,
        source: Source,
        backoff: Backoff,
        clock: Callable[[], float],
        memory_wait_s_max: float = 0.0,
    ) -> None:
        self._device = device
        self._source = source
        self._backoff = backoff
        self._clock = clock
        self._memory_wait_s_max = memory_wait_s_max
        self._under_way: deque[Job] = deque()
        self._last_end_s = 0.0

    def run(self) -> None:
        """Works until the source stops, or the device is dead for good."""
        self._watch()
        while True:
            try:
                self._work()
                break
            except DeviceLost as lost:
                while self._under_way:
                    self._source.give_back(self._under_way.popleft(), Report(), lost)
                if not self._replace(lost):
                    break

    def _work(self) -> None:
        while True:
            room = len(self._under_way) < self._device.backend.info.depth
            job = self._source.take(self._device, wait=not self._under_way) if room else None
            if job is not None:
                job.started_s = self._clock()
                self._under_way.append(job)
                self._start(job)
            elif self._under_way:
                self._finish(self._under_way.popleft())
            elif self._source.stopping:
                break

    def _start(self, job: Job) -> None:
        # Not at the scheduler's edge where any length will do: the longest row decides.
        if self._any_length:
            job.length = max(len(row) for row in job.rows)
        try:
            job.ticket = self._device.backend.submit(job.rows, job.length)
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a device raises concerns this batch
            job.error = error

    def _finish(self, job: Job) -> None:
        device = self._device
        report = Report(rows=len(job.items), length=job.length, tokens=job.tokens, device=device.name)
        try:
            whole = self._collect(job, report)
        except DeviceLost as lost:
            self._source.give_back(job, report, lost)
            raise
        end_s = self._clock()
        # Batches overlap: a batch's own time begins when the one before it ended.
        report.seconds = end_s - max(job.started_s, self._last_end_s)
        self._last_end_s = end_s
        self._count(job, report, whole=whole)
        self._source.report(report)
        # Last: the device may die on the question.
        if device.batches % MEMORY_EVERY == 1:
            self._ask_memory()

    def _count(self, job: Job, report: Report, *, whole: bool) -> None:
        device = self._device
        device.busy_s += report.seconds
        device.rows += report.rows
        device.batches += 1
        self._backoff.reset()
        # Else its time says nothing about such batches: parts of it, an error, or a wait for memory.
        if whole:
            device.admission.succeeded()
            own = self._computed(job)
            self._source.observe(
                device, Sample(len(own), sum(own), sum(length * length for length in own), report.seconds)
            )

    def _ask_memory(self) -> None:
        try:
            self._device.memory = self._device.backend.memory()
        except DeviceLost:
            raise
        except Exception:  # noqa: BLE001 - a figure that cannot be had must not stop the work
            self._device.memory = None

    @property
    def _any_length(self) -> bool:
        return self._device.backend.info.exact_lengths or self._device.backend.info.packed

    def _computed(self, job: Job) -> list[int]:
        """The tokens of each row that the device computes."""
        return self._device.backend.info.computed([len(row) for row in job.rows], job.length)

    def _collect(self, job: Job, report: Report) -> bool:
        """Gathers a job's outputs into the report, splitting it when it fails. True when it ran as a whole."""
        if job.error is None:
            try:
                rows = self._device.backend.collect(job.ticket)
                report.outputs.update((item.id, row) for item, row in zip(job.items, rows, strict=True))
            except DeviceLost:
                raise
            except Exception as error:  # noqa: BLE001 - as in _start
                job.error = error
            else:
                report.padded_tokens += sum(self._computed(job))
                return True
        self._recover(job, job.error, report)
        return False

    def _recover(self, job: Job, error: Exception, report: Report) -> None:
        no_memory = isinstance(error, DeviceOutOfMemory)
        if no_memory:
            self._empty_cache()
            self._device.admission.failed(sum(self._computed(job)))
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
            half = Job([job.items[i] for i in part], [job.rows[i] for i in part], job.length)
            self._start(half)
            self._collect(half, report)

    def _empty_cache(self) -> None:
        try:
            self._device.backend.empty_cache()
        except DeviceLost:
            raise
        except Exception as error:
            # A device that cannot even do this computes nothing any more.
            raise DeviceLost(f"its memory could not be given back: {type(error).__name__}: {error}") from error

    def _retry_alone(self, job: Job, report: Report) -> bool:
        """A single text that did not fit is tried again: at once, then while the batch has time left to wait.

        What is short may be in the hands of another process, for a moment; then nothing fits, however small.
        """
        pause_s = MEMORY_PAUSE_S_FIRST
        while True:
            try:
                (row,) = self._device.backend.collect(self._device.backend.submit(job.rows, job.length))
            except DeviceLost:
                raise
            except DeviceOutOfMemory:
                pause_s = min(pause_s, MEMORY_PAUSE_S_MAX, self._memory_wait_s_max - report.waited_s)
                if pause_s <= 0 or not self._source.pause(pause_s):
                    return False
                report.waited_s += pause_s
                pause_s *= 2
                self._empty_cache()
            except Exception:  # noqa: BLE001 - the first error is reported
                return False
            else:
                report.outputs[job.items[0].id] = row
                report.padded_tokens += sum(self._computed(job))
                return True

    def _watch(self) -> None:
        if isinstance(self._device.backend, Mortal):
            self._device.backend.watch(self._source.wake)

    def _replace(self, lost: DeviceLost) -> bool:
        """Opens the device anew. False when the runner is stopping, or nothing can be opened."""
        device, source = self._device, self._source
        device.alive = False
        device.memory = None
        device.losses += 1
        source.tell("lost", device, str(lost))
        with suppress(Exception):  # it is dead: nothing can go more wrong
            device.backend.close()
        while device.reopen is not None and source.pause(self._backoff.next_s()):
            try:
                device.backend = device.reopen()
            except Exception as error:  # noqa: BLE001 - tried again, with growing pauses
                if not source.stopping:  # else it was abandoned
                    source.tell("not_restored", device, str(error))
                continue
            device.alive = True
            source.tell("restored", device, "")
            self._watch()
            return True
        return False


def _described(error: Exception, length: int) -> SluiceError:
    if isinstance(error, DeviceOutOfMemory):
        return Retryable(f"a text of {length} tokens does not fit into the device's memory: {error}")
    return Retryable(f"inference failed: {type(error).__name__}: {error}")
