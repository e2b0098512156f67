"""The runner on a device that fails at will."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.buckets import Ladder
from engine.config import LADDER
from engine.cost import PRIOR, CostTracker
from engine.fleet import Device, DeviceEvent, Recovery
from engine.lane import Item, Priority
from engine.memory import Admission
from engine.runner import Report, Runner
from engine.scheduler import Limits, Scheduler
from sluice.errors import Backpressure, Retryable
from tests.engine.fakes import Again, FakeBackend, embedding

POISON = 999
STEPS = (1, 2, 4, 8, 16, 24)


class Desk:
    """A runner over one or more devices, with its reports."""

    def __init__(self, *backends: FakeBackend, budget: int = 256, memory_wait_s_max: float = 1e-3) -> None:
        limits = Limits(budget, 64, 10_000, 0.25, (0.05, 0.25))
        ladder = Ladder(LADDER, backends[0].length_max)
        if backends[0].exact_lengths:
            ladder = ladder.refined()
        self.admissions = [Admission(budget) for _ in backends]
        self.devices = [
            # The same object stands for the device that was opened anew.
            Device(f"fake/{i}", backend, CostTracker(), self.admissions[i], Again(lambda backend=backend: backend))
            for i, backend in enumerate(backends)
        ]
        self.reports: list[Report] = []
        self.events: list[DeviceEvent] = []
        recovery = Recovery(first_s=1e-4, max_s=1e-3, memory_wait_s_max=memory_wait_s_max)
        self.runner = Runner(
            self.devices, Scheduler(ladder, limits, PRIOR), self._report, on_event=self.events.append, recovery=recovery
        )
        self._wanted = 0
        self._done = threading.Event()
        self._lock = threading.Lock()

    @property
    def admission(self) -> Admission:
        return self.admissions[0]

    @property
    def outcomes(self) -> dict[int, object]:
        return {key: value for report in self.reports for key, value in report.outputs.items()}

    def _report(self, report: Report) -> None:
        with self._lock:
            for key in report.outputs:
                assert key not in self.outcomes, "reported twice"
            self.reports.append(report)
            settled = len(self.outcomes) + sum(len(each.expired) for each in self.reports)
            if settled >= self._wanted:
                self._done.set()

    def run(self, rows: list[np.ndarray]) -> None:  # type: ignore[type-arg]
        """Adds all rows, runs until all are reported."""
        self._wanted = len(rows)
        items = [Item(i, len(row), Priority.BACKGROUND, 0.0) for i, row in enumerate(rows)]
        if rows:
            self.runner.add(items, rows)
        with self.running():
            assert not rows or self._done.wait(30)

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.runner.run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.runner.stop()
            thread.join(30)
            assert not thread.is_alive()


def rows(*lengths: int) -> list[np.ndarray]:  # type: ignore[type-arg]
    return [np.full(length, 2 + i % 500, np.int32) for i, length in enumerate(lengths)]


def right(outcome: object, row: np.ndarray) -> bool:  # type: ignore[type-arg]
    return isinstance(outcome, np.ndarray) and bool((outcome == embedding(row)).all())


kinds = st.sampled_from(["exact", "fixed", "filled", "packed"])


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 64), max_size=60),
    st.integers(64, 300),
    st.sets(st.integers(1, 30), max_size=6),
    kinds,
    st.sampled_from([1, 2]),
    st.sampled_from([1, 3]),
)
def test_out_of_memory_never_loses_doubles_or_changes_a_text(
    lengths: list[int], memory: int, failures: set[int], kind: str, depth: int, devices: int
) -> None:
    desk = Desk(
        *(
            FakeBackend(
                memory_tokens=memory,
                fail_submissions=failures,
                exact_lengths=kind not in {"fixed", "filled"},
                row_steps=STEPS if kind == "filled" else (),
                packed=kind == "packed",
                depth=depth,
            )
            for _ in range(devices)
        ),
        budget=512,
    )
    batch = rows(*lengths)
    desk.run(batch)
    assert desk.outcomes.keys() == set(range(len(batch)))
    # A text alone is tried at least twice: it may fail only if memory failed twice in a row.
    wrong = [i for i, row in enumerate(batch) if not right(desk.outcomes[i], row)]
    assert all(isinstance(desk.outcomes[i], Retryable) for i in wrong)
    assert len(wrong) <= devices * (len(failures) // 2)


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 64), max_size=60),
    st.sets(st.integers(1, 25), max_size=8),
    st.sets(st.integers(1, 25), max_size=8),
    kinds,
    st.sampled_from([1, 2]),
    st.sampled_from([1, 3]),
)
def test_devices_that_die_never_lose_double_or_change_a_text(
    lengths: list[int], at_submit: set[int], at_collect: set[int], kind: str, depth: int, devices: int
) -> None:
    desk = Desk(
        *(
            FakeBackend(
                lose_submissions=at_submit,
                lose_collections=at_collect,
                fail_submissions={3, 4},
                exact_lengths=kind not in {"fixed", "filled"},
                row_steps=STEPS if kind == "filled" else (),
                packed=kind == "packed",
                depth=depth,
            )
            for _ in range(devices)
        )
    )
    batch = rows(*lengths)
    desk.run(batch)
    assert desk.outcomes.keys() == set(range(len(batch)))
    wrong = [i for i, row in enumerate(batch) if not right(desk.outcomes[i], row)]
    # Given up only when its device died a second time, or memory failed twice in a row.
    lost = sum(event.kind == "lost" for event in desk.events)
    assert len(wrong) <= depth * lost + devices
    assert all(isinstance(desk.outcomes[i], Retryable) for i in wrong)
    assert {event.kind for event in desk.events} <= {"lost", "restored"}
    assert not desk.runner.queued_tokens


def test_out_of_memory_empties_the_cache_splits_and_lowers_the_limit() -> None:
    backend = FakeBackend(memory_tokens=100, exact_lengths=False)
    desk = Desk(backend, budget=256)
    batch = rows(*[16] * 64)
    desk.run(batch)
    assert all(right(desk.outcomes[i], row) for i, row in enumerate(batch))
    assert backend.emptied >= 1
    assert desk.admission.tokens_max <= 128
    assert sum(report.splits for report in desk.reports) >= 1
    assert max(count * length for count, length in backend.batches) <= 100


def test_a_text_that_never_fits_fails_alone_with_a_message() -> None:
    backend = FakeBackend(memory_tokens=40)
    desk = Desk(backend)
    batch = rows(8, 64, 8)
    desk.run(batch)
    assert right(desk.outcomes[0], batch[0])
    assert right(desk.outcomes[2], batch[2])
    assert "does not fit into the device's memory" in str(desk.outcomes[1])


class Shared(FakeBackend):
    """Has no memory at all for the first so many tries."""

    short = 12

    def submit(self, rows: Sequence[Any], length: int) -> object:
        self.memory_tokens = 0 if self.submissions < self.short else 1 << 30
        return super().submit(rows, length)


def test_memory_that_something_else_holds_for_a_while_fails_no_text() -> None:
    desk = Desk(Shared(), memory_wait_s_max=30.0)
    desk.runner.pause = lambda seconds: not desk.runner.stopping  # type: ignore[method-assign] # no real waiting
    batch = rows(*[10] * 200)
    desk.run(batch)
    assert all(right(desk.outcomes[i], row) for i, row in enumerate(batch))
    assert sum(report.waited_s for report in desk.reports) > 0


def test_waiting_for_memory_is_bounded_by_batch_and_pauses_grow() -> None:
    desk = Desk(FakeBackend(memory_tokens=0), memory_wait_s_max=1.0)
    pauses: list[float] = []

    def pause(seconds: float) -> bool:
        pauses.append(seconds)
        return True

    desk.runner.pause = pause  # type: ignore[method-assign]
    desk.run(rows(*[10] * 4))  # one batch
    assert pauses == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.25])
    assert all("does not fit" in str(outcome) for outcome in desk.outcomes.values())
    assert len(desk.outcomes) == 4


def test_stopping_does_not_wait_for_memory() -> None:
    desk = Desk(FakeBackend(memory_tokens=0), memory_wait_s_max=3600.0)
    waiting = threading.Event()
    pause = desk.runner.pause

    def told(seconds: float) -> bool:
        waiting.set()
        return pause(600)

    desk.runner.pause = told  # type: ignore[method-assign]
    desk.runner.add([Item(0, 10, Priority.BACKGROUND, 0.0)], rows(10))
    with desk.running():
        assert waiting.wait(30)
    assert isinstance(desk.outcomes[0], Retryable)


def test_a_text_that_makes_the_device_fail_fails_alone() -> None:
    backend = FakeBackend(poison=POISON)
    desk = Desk(backend)
    batch = rows(*[10] * 30)
    batch[17] = np.array([5, POISON, 7], np.int32)
    desk.run(batch)
    assert "poisoned" in str(desk.outcomes[17])
    assert all(right(desk.outcomes[i], row) for i, row in enumerate(batch) if i != 17)


def test_what_waits_when_it_stops_gets_an_error() -> None:
    gate = threading.Event()
    backend = FakeBackend(gate=gate)
    desk = Desk(backend, budget=64)
    batch = rows(*[60] * 5)
    desk.runner.add([Item(i, 60, Priority.BACKGROUND, 0.0) for i in range(5)], batch)
    with desk.running():
        assert backend.started.wait(30)
        desk.runner.stop()
        gate.set()
    assert desk.outcomes.keys() == set(range(5))
    assert sum(isinstance(outcome, Retryable) for outcome in desk.outcomes.values()) == 4
    with pytest.raises(Retryable, match="stopping"):
        desk.runner.add([Item(9, 5, Priority.ONLINE, 0.0)], rows(5))


def test_what_is_cancelled_while_it_waits_is_not_computed() -> None:
    gate = threading.Event()
    backend = FakeBackend(gate=gate)
    desk = Desk(backend, budget=64)
    desk.runner.add([Item(i, 60, Priority.BACKGROUND, float(i)) for i in range(4)], rows(*[60] * 4))
    with desk.running():
        assert backend.started.wait(30)
        assert desk.runner.cancel([0, 1, 2, 3]) == [1, 2, 3]
        gate.set()
    assert desk.outcomes.keys() == {0}
    assert backend.submissions == 1


def test_expired_texts_are_reported_and_never_computed() -> None:
    backend = FakeBackend()
    desk = Desk(backend)
    desk._wanted = 2
    late = Item(0, 10, Priority.ONLINE, 0.0, deadline_s=0.1)
    desk.runner.add([late, Item(1, 10, Priority.ONLINE, 0.0)], rows(10, 10))
    with desk.running():
        assert desk._done.wait(30)
    assert [report.expired for report in desk.reports if report.expired] == [(0,)]
    assert desk.outcomes.keys() == {1}


def test_a_full_queue_refuses_and_keeps_nothing_of_the_call() -> None:
    desk = Desk(FakeBackend())
    many = [Item(i, 60, Priority.BACKGROUND, 0.0) for i in range(120)]
    desk.runner.add(many, rows(*[60] * 120))
    with pytest.raises(Backpressure):
        desk.runner.add([Item(500 + i, 60, Priority.BACKGROUND, 0.0) for i in range(120)], rows(*[60] * 120))
    assert desk.runner.queued_tokens == 7200
    desk._wanted = 120
    with desk.running():
        assert desk._done.wait(30)


def test_reports_add_up() -> None:
    backend = FakeBackend(exact_lengths=False)
    desk = Desk(backend)
    lengths = [3, 17, 30, 64, 9, 12] * 10
    desk.run(rows(*lengths))
    assert sum(report.rows for report in desk.reports) == 60
    assert sum(report.tokens for report in desk.reports) == sum(lengths)
    assert sum(report.padded_tokens for report in desk.reports) == sum(r * n for r, n in backend.batches)
    (device,) = desk.runner.devices()
    assert (device.rows, device.batches) == (60, len(backend.batches))
    assert device.busy_s == pytest.approx(sum(report.seconds for report in desk.reports))
    assert {report.device for report in desk.reports} == {device.name}
    assert device.memory is not None


def test_a_packed_device_computes_no_padding_and_its_budget_counts_real_tokens() -> None:
    backend = FakeBackend(packed=True)
    desk = Desk(backend, budget=128)
    lengths = [3, 17, 30, 64, 9, 12] * 10
    desk.run(rows(*lengths))
    assert sum(report.padded_tokens for report in desk.reports) == sum(lengths)
    assert max(report.tokens for report in desk.reports) <= 128
    assert len(desk.reports) <= 1.4 * sum(lengths) / 128


def test_rows_that_only_fill_a_batch_up_count_as_padding_and_as_cost() -> None:
    backend = FakeBackend(exact_lengths=False, row_steps=STEPS)
    desk = Desk(backend, budget=512)
    lengths = [3, 17, 30, 64, 9, 12] * 9 + [8] * 39
    desk.run(rows(*lengths))
    ran = [(min((step for step in STEPS if step >= count), default=count), n) for count, n in backend.batches]
    assert any(filled > count for (filled, _), (count, _) in zip(ran, backend.batches, strict=True))
    assert any(count > STEPS[-1] for count, _ in backend.batches), "beyond the last step nothing is filled up"
    assert [report.padded_tokens for report in desk.reports] == [filled * n for filled, n in ran]
    assert sum(report.rows for report in desk.reports) == len(lengths)
    samples = {sample[:3] for sample in desk.devices[0].costs.samples()}
    assert samples <= {(filled, filled * n, filled * n * n) for filled, n in ran}


def test_what_failed_or_waited_says_nothing_about_what_batches_cost() -> None:
    desk = Desk(FakeBackend(poison=POISON))
    desk.run([np.array([5, POISON, 7], np.int32)])
    assert desk.devices[0].costs.samples() == []
    desk = Desk(FakeBackend(fail_submissions={1, 2}), memory_wait_s_max=30.0)
    desk.runner.pause = lambda seconds: not desk.runner.stopping  # type: ignore[method-assign] # no real waiting
    desk.run(rows(10))
    assert desk.reports[0].waited_s > 0
    assert desk.devices[0].costs.samples() == []


def test_stopping_gives_up_opening_a_device_anew() -> None:
    desk = Desk(FakeBackend())
    desk.run(rows(5))
    reopen = desk.devices[0].reopen
    assert isinstance(reopen, Again)
    assert reopen.cancelled
