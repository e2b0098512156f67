"""Worker processes: driven like a backend here, and ended with it."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from engine.backend import DeviceLost, DeviceOutOfMemory
from engine.config import CacheConfig, EngineConfig
from engine.devices import numa_nodes
from engine.loading import Loaded, load
from engine.remote import RemoteBackend, ReopenWorker, WorkerSpec, _Child, open_workers
from sluice.errors import ConfigError, Permanent, Retryable
from tests.engine.fleets import FAKE, Fleet, caught_in_the_middle, kill, right, rows, spec, until, workers


@contextmanager
def worker(**arguments: Any) -> Iterator[RemoteBackend]:
    backend = RemoteBackend(spec(**arguments))
    try:
        yield backend
    finally:
        backend.close()


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_errors_of_the_backend_arrive_as_what_they_are() -> None:
    with worker(memory_tokens=20, poison=7) as backend:
        with pytest.raises(DeviceOutOfMemory, match="4 rows of 10"):
            backend.collect(backend.submit(rows(10, 10, 10, 10), 10))
        with pytest.raises(RuntimeError, match="poisoned"):
            backend.collect(backend.submit([np.array([7, 8], np.int32)], 2))
        batch = rows(5, 3)
        assert all(map(right, backend.collect(backend.submit(batch, 5)), batch))
        assert backend.memory().peak == 10_000
        backend.empty_cache()
        assert backend.memory().peak == 0


def test_each_batch_gets_its_own_outputs_in_whatever_order_they_are_asked_for() -> None:
    with worker(depth=2) as backend:
        batches = [rows(5, 3), [np.array([7, 8], np.int32)]]
        tickets = [backend.submit(batch, 5) for batch in batches]
        for ticket, batch in zip(reversed(tickets), reversed(batches), strict=True):
            assert all(map(right, backend.collect(ticket), batch))
        with pytest.raises(RuntimeError, match="no batch"):
            backend.collect(tickets[0])
        assert all(map(right, backend.collect(backend.submit(batches[0], 5)), batches[0]))


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_out_of_memory_with_two_batches_under_way_gives_every_text_its_own_outputs(failing: int) -> None:
    batch = [np.arange(i, i + 32, dtype=np.int32) + 2 for i in range(64)]
    fleet = Fleet(workers(1, depth=2, fail_submissions=[failing]))
    with fleet.running():
        fleet.add(batch)
        fleet.wait(len(batch))
    assert [i for i, row in enumerate(batch) if not right(fleet.outcomes[i], row)] == []


def test_a_backend_that_cannot_be_opened_raises_what_it_would_here() -> None:
    with pytest.raises(Permanent, match="no safetensors") as refusal:
        RemoteBackend(spec("tests.engine.test_workers:refuse"))
    assert not isinstance(refusal.value, ConfigError)
    with pytest.raises(RuntimeError, match="ValueError: a bug"):
        RemoteBackend(spec("tests.engine.test_workers:break_down"))
    with pytest.raises(Retryable, match=r"did not start.*SIGKILL"):
        RemoteBackend(spec("tests.engine.test_workers:die"))
    with pytest.raises(Permanent, match="no safetensors"):
        open_workers([spec(), spec("tests.engine.test_workers:refuse"), spec()])
    assert not children()


def refuse() -> None:
    raise Permanent("no safetensors weights")


def break_down() -> None:
    raise ValueError("a bug")


def die() -> None:
    kill(os.getpid())


def hang() -> None:
    threading.Event().wait()


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "engine.worker" in child.cmdline()]


def test_a_worker_that_nobody_waits_for_any_more_is_not_started() -> None:
    reopen = ReopenWorker(spec())
    reopen.cancel()
    with pytest.raises(Retryable, match="nobody waits"):
        reopen()
    assert not children()


def test_a_start_that_is_given_up_at_its_very_beginning_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    reopen = ReopenWorker(replace(spec("tests.engine.test_workers:hang"), start_s_max=5.0))

    class Late(_Child):
        def __init__(self) -> None:
            super().__init__()
            reopen.cancel()

    monkeypatch.setattr("engine.remote._Child", Late)
    with pytest.raises(Retryable, match=r"did not start.*SIGKILL"):
        reopen()
    assert not children()


def test_a_worker_that_ends_before_it_was_told_what_to_open_is_an_error_to_try_again() -> None:
    child = _Child()
    child.kill()
    with pytest.raises(Retryable, match="did not start"):
        RemoteBackend(spec(), child)
    assert not children()


def test_giving_up_later_starts_ends_no_worker_that_is_at_work() -> None:
    reopen = ReopenWorker(spec())
    backend = reopen()
    try:
        reopen.cancel()
        assert all(map(right, backend.collect(backend.submit(rows(5, 3), 5)), rows(5, 3)))
    finally:
        backend.close()


def test_a_worker_that_cannot_be_started_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for nothing in ("/nowhere/python", None):
        monkeypatch.setattr(sys, "executable", nothing)
        with pytest.raises(Retryable, match="cannot be started"):
            RemoteBackend(spec())


def test_a_figure_that_cannot_be_had_does_not_cost_the_worker() -> None:
    with worker(memory_unknown=True) as backend:
        with pytest.raises(RuntimeError, match="no figures"):
            backend.memory()
        assert all(map(right, backend.collect(backend.submit(rows(5, 3), 5)), rows(5, 3)))


def test_a_dead_process_is_a_lost_device_that_says_how() -> None:
    with worker() as backend:
        seen = threading.Event()
        backend.watch(seen.set)
        ticket = backend.submit(rows(3), 3)
        kill(backend.pid)
        with pytest.raises(DeviceLost, match="SIGKILL"):
            backend.collect(ticket)
        assert seen.wait(10)
        assert not backend.alive
        with pytest.raises(DeviceLost):
            backend.collect(backend.submit(rows(3), 3))
        told_at_once = threading.Event()
        backend.watch(told_at_once.set)
        assert told_at_once.is_set()


def test_a_process_that_does_not_answer_is_killed_and_counts_as_lost(tmp_path: Path) -> None:
    fifo = tmp_path / "batch"
    os.mkfifo(fifo)
    with worker(hang_once=str(fifo), answer_s_max=0.3) as backend:
        reader = threading.Thread(target=caught_in_the_middle, args=(fifo,))
        reader.start()
        with pytest.raises(DeviceLost, match="was killed: no answer within"):
            backend.collect(backend.submit(rows(3), 3))
        reader.join(10)
        until(lambda: not backend.alive)


def test_a_process_that_reads_nothing_is_killed_in_time_and_counts_as_lost() -> None:
    with worker(answer_s_max=0.3, close_s_max=0.3, length_max=512, depth=2) as backend:
        os.kill(backend.pid, signal.SIGSTOP)
        raised: list[BaseException] = []

        def fill_the_line() -> None:
            try:
                for _ in range(200):  # 25 MB: more than a socket takes
                    backend.submit(rows(*[512] * 64), 512)
            except DeviceLost as lost:
                raised.append(lost)

        thread = threading.Thread(target=fill_the_line, daemon=True)
        thread.start()
        thread.join(10)
        hung = thread.is_alive()
        with suppress(ProcessLookupError):
            kill(backend.pid)
        thread.join(10)
        assert not hung
        assert "was killed: not read within 0.3 s" in str(raised[0])
        assert not backend.alive


def test_closing_does_not_wait_for_a_process_that_reads_nothing() -> None:
    backend = RemoteBackend(spec(close_s_max=0.2, length_max=512))
    os.kill(backend.pid, signal.SIGSTOP)
    ours = backend._channel._socket
    ours.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            ours.send(bytes(1 << 16))
    thread = threading.Thread(target=backend.close, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert not backend.alive


def test_a_device_lost_inside_a_worker_ends_the_process() -> None:
    with worker(lose_submissions=[2]) as backend:
        assert len(backend.collect(backend.submit(rows(3), 3))) == 1
        with pytest.raises(DeviceLost, match="the test took it away"):
            backend.collect(backend.submit(rows(3), 3))
        until(lambda: not backend.alive)
    with worker(lose_collections=[1]) as backend:
        with pytest.raises(DeviceLost, match="the test took it away"):
            backend.collect(backend.submit(rows(3), 3))
        until(lambda: not backend.alive)


def test_signals_to_the_group_do_not_end_a_worker_before_its_parent_says_so() -> None:
    with worker() as backend:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(backend.pid, number)
        assert len(backend.collect(backend.submit(rows(3), 3))) == 1
    assert not psutil.pid_exists(backend.pid)


def test_no_descriptor_is_left_of_workers_that_were_closed() -> None:
    before = descriptors()
    for _ in range(2):
        with worker() as backend:
            assert backend.reasons == {"fake": "yes"}
    assert descriptors() == before


def test_no_worker_outlives_its_parent_not_even_in_mid_batch(tmp_path: Path) -> None:
    fifo = tmp_path / "batch"
    os.mkfifo(fifo)
    program = (
        "import numpy, sys; from engine.remote import *;"
        f"backend = RemoteBackend(WorkerSpec({FAKE!r}, dict(hang_once=sys.argv[1])));"
        "backend.collect(backend.submit([numpy.ones(3, numpy.int32)], 3))"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(fifo)]) as parent:
        child = psutil.Process(caught_in_the_middle(fifo))
        parent.kill()
        parent.wait()
        child.wait(10)


@pytest.fixture
def opened() -> Iterator[Callable[..., Loaded]]:
    with ExitStack() as stack:

        def start(**changes: Any) -> Loaded:
            loaded = load(EngineConfig(**{"device": "cpu", "precision": "fp32", "fit_seconds_max": 0.1, **changes}))
            stack.callback(loaded.close)
            return loaded

        yield start


def test_a_real_model_gives_the_same_in_worker_processes(
    opened: Callable[..., Loaded], tiny_models: dict[str, Path]
) -> None:
    here = opened(model=str(tiny_models["bert"]), workers=1)
    there = opened(model=str(tiny_models["bert"]), workers=2, worker_kind="process")
    assert [each.name for each in there.devices] == ["cpu/0", "cpu/1"]
    batch = [np.array([1, 5, 9, 2], np.int32), np.array([1, 7, 2], np.int32)]
    expected = here.devices[0].backend.collect(here.devices[0].backend.submit(batch, 4))
    for each in there.devices:
        assert isinstance(each.backend, RemoteBackend)
        for one, other in zip(expected, each.backend.collect(each.backend.submit(batch, 4)), strict=True):
            np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), atol=2e-3)
    assert "worker processes" in there.reasons["devices"]
    assert here.version == there.version


async def test_an_engine_divides_its_texts_among_lanes_and_gives_the_same(
    open_engine: Callable[..., Any], tiny_models: dict[str, Path]
) -> None:
    texts = [f"the disk is full {'error ' * (i % 30)}" for i in range(300)]
    found = []
    for parts in (1, 2):
        section = EngineConfig(
            model=str(tiny_models["bert"]),
            device="cpu",
            precision="fp32",
            workers=parts,
            worker_kind="thread",
            batch_tokens=128,
            fit_seconds_max=0.1,
            caches=CacheConfig(token_bytes_max=0, result_bytes_max=0),
        )
        engine = await open_engine(section)
        analyses = await engine.analyze(texts, task="embed")
        found.append([np.frombuffer(each.embedding, np.float16).astype(np.float32) for each in analyses])
        stats = engine.stats()
        assert len(stats.devices) == parts
        assert all(device.rows > 0 and device.busy_s > 0 for device in stats.devices)
        assert stats.device_busy_s == pytest.approx(sum(device.busy_s for device in stats.devices))
    np.testing.assert_allclose(found[0], found[1], atol=2e-3)


def test_a_damaged_model_is_the_same_error_in_a_worker(
    opened: Callable[..., Loaded], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in tiny_models["bert"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.safetensors").write_bytes(b"nonsense" * 100)
    messages = []
    for kind in ("thread", "process"):
        with pytest.raises(Permanent) as refusal:
            opened(model=str(folder), workers=1, worker_kind=kind)
        messages.append(str(refusal.value))
    assert messages[0] == messages[1]
    assert str(folder) in messages[0]


def test_nodes_are_read_as_linux_tells_them(tmp_path: Path) -> None:
    for node, cpus in {"node0": "0-3,8\n", "node1": "4-7\n", "node2": "\n"}.items():
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(cpus)
    assert numa_nodes(range(16), tmp_path) == [(0, 1, 2, 3, 8), (4, 5, 6, 7)]
    assert numa_nodes([1, 4, 5], tmp_path) == [(1,), (4, 5)]
    assert numa_nodes([3, 1], tmp_path / "none") == [(1, 3)]


def test_a_worker_whose_cpus_were_taken_away_works_on_others() -> None:
    backend = RemoteBackend(WorkerSpec(FAKE, cpus=(1023,)))
    try:
        assert os.sched_getaffinity(backend.pid) == os.sched_getaffinity(0)
    finally:
        backend.close()


def test_a_worker_can_be_bound_to_cpus() -> None:
    cpu = min(os.sched_getaffinity(0))
    backend = RemoteBackend(WorkerSpec(FAKE, cpus=(cpu,)))
    try:
        assert os.sched_getaffinity(backend.pid) == {cpu}
    finally:
        backend.close()
