"""Several devices on one queue: the load is shared, and never a text is lost when one dies."""

import itertools
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from engine.backend import Backend, DeviceLost, DeviceOutOfMemory
from engine.fleet import Recovery
from engine.remote import RemoteBackend, ReopenWorker
from sluice.errors import Permanent, Retryable
from tests.engine.fakes import FakeBackend
from tests.engine.fleets import Fleet, caught_in_the_middle, device, kill, right, rows, spec, until, workers

DEADLY = 900


def test_a_worker_killed_in_mid_batch_again_and_again_loses_no_text(tmp_path: Path) -> None:
    fifo = tmp_path / "batch"
    os.mkfifo(fifo)
    batch = rows(*[4 + i % 60 for i in range(150)])
    fleet = Fleet(workers(2, hang_once=str(fifo)))
    with fleet.running():
        fleet.add(batch)
        for _ in range(2):
            kill(caught_in_the_middle(fifo))
            fifo.with_suffix(".first").unlink(missing_ok=True)  # the next batch hangs too
        kill(caught_in_the_middle(fifo))
        fleet.wait(len(batch))
        until(lambda: fleet.kinds().count("restored") == 3)
    failed = [i for i, row in enumerate(batch) if not right(fleet.outcomes[i], row)]
    # A text whose worker was killed twice is given up; each was alone the second time.
    assert len(failed) <= 2
    assert all(isinstance(fleet.outcomes[i], Retryable) for i in failed)
    assert fleet.kinds().count("lost") == 3


def test_a_text_that_kills_workers_fails_alone_and_the_other_devices_go_on() -> None:
    batch = rows(*[10] * 60)
    batch[23] = np.array([5, DEADLY, 7], np.int32)
    fleet = Fleet(workers(2, deadly=DEADLY))
    with fleet.running():
        fleet.add(batch)
        fleet.wait(len(batch))
        fleet.add(rows(8, 8), start=1000)
        fleet.wait(len(batch) + 2)
    assert "died on this text" in str(fleet.outcomes[23])
    assert isinstance(fleet.outcomes[23], Retryable)
    assert all(right(fleet.outcomes[i], row) for i, row in enumerate(batch) if i != 23)
    assert fleet.kinds().count("lost") == 2


def test_a_worker_that_dies_idle_is_replaced_before_anything_is_given_to_it() -> None:
    devices = workers(1)
    fleet = Fleet(devices)
    with fleet.running():
        fleet.add(rows(5))
        fleet.wait(1)
        until(lambda: fleet.runner._idle == 1)
        kill(devices[0].backend.pid)  # type: ignore[attr-defined]
        until(lambda: "restored" in fleet.kinds())
        fleet.add(rows(5, 6, 7), start=1)
        fleet.wait(4)
    assert all(isinstance(outcome, np.ndarray) for outcome in fleet.outcomes.values())


class Fragile(FakeBackend):
    """Dies at its first batch."""

    def submit(self, rows: Sequence[Any], length: int) -> object:
        raise DeviceLost("pulled out")


def test_without_any_device_for_too_long_texts_get_errors_until_one_is_back() -> None:
    allowed = threading.Event()

    def reopen() -> Backend:
        if not allowed.is_set():
            raise Permanent("no driver")
        return FakeBackend()

    recovery = Recovery(first_s=0.01, max_s=0.02, gone_s_max=0.1)
    fleet = Fleet([device("a", Fragile(), reopen), device("b", Fragile(), reopen)], recovery)
    with fleet.running():
        fleet.add(rows(5, 9, 60))
        fleet.wait(3)
        until(lambda: "down" in fleet.kinds())
        assert all(isinstance(outcome, Retryable) for outcome in fleet.outcomes.values())
        with pytest.raises(Retryable, match="no device"):
            fleet.add(rows(5), start=10)
        assert not any(each.alive for each in fleet.runner.devices())
        allowed.set()
        until(lambda: "up" in fleet.kinds())
        fleet.add(rows(5, 6), start=20)
        fleet.wait(5)
    assert isinstance(fleet.outcomes[20], np.ndarray)
    assert "no driver" in next(event.detail for event in fleet.events if event.kind == "not_restored")
    assert fleet.died is None


def test_a_device_that_cannot_be_replaced_leaves_the_others_its_work() -> None:
    dead = device("dead", Fragile())
    dead.memory = FakeBackend().memory()
    gate = threading.Event()
    fleet = Fleet([dead, device("well", FakeBackend(gate=gate))])
    batch = rows(*range(1, 61))
    with fleet.running():
        until(lambda: fleet.runner._idle == 2)  # else the other one may take everything
        fleet.add(batch)
        until(lambda: not dead.alive)
        gate.set()
        fleet.wait(len(batch))
    assert dead.memory is None, "it has none any more"
    assert all(right(fleet.outcomes[i], row) for i, row in enumerate(batch))
    assert fleet.died is None


def test_when_the_last_device_is_dead_for_good_everybody_is_told() -> None:
    fleet = Fleet([device("dead", Fragile())])
    with fleet.running():
        fleet.add(rows(5, 6, 7))
        fleet.wait(3)
        until(lambda: fleet.died is not None)
    assert all(isinstance(outcome, Retryable) for outcome in fleet.outcomes.values())
    assert fleet.kinds() == ["lost", "down"]
    assert isinstance(fleet.died, Retryable)


def test_idle_devices_share_what_there_is() -> None:
    gate = threading.Event()
    backends = [FakeBackend(gate=gate), FakeBackend(gate=gate)]
    fleet = Fleet([device(f"d{i}", backend, budget=4096) for i, backend in enumerate(backends)], budget=4096)
    with fleet.running():
        until(lambda: fleet.runner._idle == 2)
        fleet.add(rows(*[50] * 60))
        assert all(backend.started.wait(30) for backend in backends)
        gate.set()
        fleet.wait(60)
        stats = fleet.runner.devices()
    assert all(20 <= each.rows <= 40 for each in stats)
    assert fleet.runner.busy_s == pytest.approx(sum(each.busy_s for each in stats))


def test_nothing_waits_behind_a_device_that_is_slow() -> None:
    gate = threading.Event()
    slow, quick = FakeBackend(gate=gate), FakeBackend()
    fleet = Fleet([device("slow", slow), device("quick", quick)])
    numbers = itertools.count(1000)

    def slow_is_at_work() -> bool:
        if not slow.started.is_set():
            fleet.add(rows(20), start=next(numbers))
        return slow.started.is_set()

    with fleet.running():
        until(slow_is_at_work)
        fleet.add(rows(*[20] * 300))
        until(lambda: fleet.outcomes.keys() >= set(range(300)))
        assert "slow" not in fleet.by_device
        gate.set()
        fleet.wait(300 + next(numbers) - 1000)


class Worse(FakeBackend):
    """Out of memory, and then not even its memory can be given back."""

    def submit(self, rows: Sequence[Any], length: int) -> object:
        raise DeviceOutOfMemory("full")

    def empty_cache(self) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")


def test_a_device_that_cannot_give_memory_back_is_replaced_and_ends_nothing_else() -> None:
    fleet = Fleet([device("worse", Worse(), FakeBackend), device("well", FakeBackend())])
    batch = rows(*range(1, 61))
    with fleet.running():
        fleet.add(batch)
        fleet.wait(len(batch))
    assert all(right(fleet.outcomes[i], row) for i, row in enumerate(batch))
    assert fleet.died is None


def test_a_lone_device_that_cannot_give_memory_back_is_opened_anew() -> None:
    fleet = Fleet([device("worse", Worse(), FakeBackend)])
    batch = rows(5, 6, 7)
    with fleet.running():
        fleet.add(batch)
        fleet.wait(len(batch))
    assert all(right(fleet.outcomes[i], row) for i, row in enumerate(batch))
    assert fleet.kinds() == ["lost", "restored"]
    assert "launch failure" in fleet.events[0].detail


def test_short_memory_on_one_device_lowers_its_limit_only() -> None:
    gate, short = threading.Event(), FakeBackend(memory_tokens=100)
    fleet = Fleet([device("small", short), device("large", FakeBackend(gate=gate))])
    batch = rows(*[16] * 300)
    with fleet.running():
        fleet.add(batch)
        until(lambda: short.emptied > 0)  # while the large one is held back
        gate.set()
        fleet.wait(len(batch))
    assert all(right(fleet.outcomes[i], row) for i, row in enumerate(batch))
    small, large = fleet.runner.devices()
    assert large.tokens_max == 256
    assert 0 < small.tokens_max <= 128


def test_a_device_of_this_process_that_dies_goes_on_in_a_worker() -> None:
    lost = device("cuda:0", Fragile(), ReopenWorker(spec()))
    fleet = Fleet([lost])
    batch = rows(*range(1, 31))
    with fleet.running():
        fleet.add(batch)
        fleet.wait(len(batch))
        assert isinstance(lost.backend, RemoteBackend)
    assert all(right(fleet.outcomes[i], row) for i, row in enumerate(batch))
    assert fleet.kinds() == ["lost", "restored"]


def test_stopping_does_not_wait_for_a_worker_that_is_just_being_opened(tmp_path: Path) -> None:
    fifo = tmp_path / "opening"
    os.mkfifo(fifo)
    slow = replace(spec("tests.engine.fakes:open_never", fifo=str(fifo)), start_s_max=3600.0)
    fleet = Fleet([device("a", Fragile(), ReopenWorker(slow))])
    with fleet.running():
        fleet.add(rows(5, 9))
        pid = caught_in_the_middle(fifo)
    assert not psutil.pid_exists(pid)
    assert fleet.kinds() == ["lost"], "an attempt that was given up is no failure"
    assert all(isinstance(outcome, Retryable) for outcome in fleet.outcomes.values())
    assert len(fleet.outcomes) == 2
