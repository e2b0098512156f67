"""Which devices are opened for a model, and what is said about it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import cpus, devices, models
from engine.config import EngineConfig
from engine.cpus import Cpus
from engine.devices import Opened, divided, node_specs, open_devices
from engine.models import ModelCard
from engine.remote import RemoteBackend
from sluice.errors import Retryable
from tests.engine.fakes import FakeBackend
from tests.engine.test_backend import rows, run, same
from tests.engine.test_lanes import Clockwork

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be taken")


def card(folder: Path) -> ModelCard:
    return models.read_card(str(folder), folder)


def section(folder: Path, **changes: Any) -> EngineConfig:
    return EngineConfig(**{"model": str(folder), "precision": "fp32", "fit_seconds_max": 0.05, **changes})


def reasons_for(folder: Path, **changes: Any) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for each in open_devices(section(folder, **changes), card(folder), reasons):
        each.backend.close()
    return reasons


ONE_WORKER = {"workers": 1, "worker_kind": "process"}


@NO_GPU
@pytest.mark.parametrize("kind", [{}, {"workers": 2, "worker_kind": "thread"}, ONE_WORKER])
def test_what_was_found_is_not_said_to_be_configured(tiny_models: dict[str, Path], kind: dict[str, Any]) -> None:
    reasons = reasons_for(tiny_models["bert"], **kind)
    assert reasons["device"] == "cpu: no CUDA device is there"
    assert reasons["threads"].endswith(f": {len(os.sched_getaffinity(0))} CPUs are allowed")


@pytest.mark.parametrize("kind", [{}, ONE_WORKER])
def test_what_is_configured_is_said_to_be(tiny_models: dict[str, Path], kind: dict[str, Any]) -> None:
    reasons = reasons_for(tiny_models["bert"], device="cpu", threads=1, **kind)
    assert reasons["device"] == "cpu: configured"
    assert reasons["threads"].startswith("1")
    assert reasons["threads"].endswith("configured")


def test_an_accelerator_of_this_process_goes_on_in_a_worker_with_the_same_choices(tiny_models: dict[str, Path]) -> None:
    """What a dead context leaves; the CPU stands for the accelerator."""
    folder, reasons = tiny_models["bert"], {}
    config = section(folder, device="cpu", precision="bf16", threads=1, prepack="off")
    (opened,) = devices._accelerators(config, card(folder), reasons, ["cpu"])
    assert opened.reopen is not None
    asked = opened.reopen.spec.arguments["config"]
    assert (asked["device"], asked["precision"], asked["backend"]) == ("cpu", "bf16", "torch")
    assert "a worker process takes over" in reasons["devices"]
    expected = run(opened.backend, rows(3, 17, 8))
    opened.backend.close()
    again = opened.reopen()
    try:
        assert isinstance(again, RemoteBackend)
        assert again.info == opened.backend.info
        assert all(same(one, other) for one, other in zip(run(again, rows(3, 17, 8)), expected, strict=True))
    finally:
        again.close()


def test_a_precision_that_was_measured_is_what_a_worker_that_takes_over_gets(tiny_models: dict[str, Path]) -> None:
    folder = tiny_models["bert"]
    config = section(folder, device="cpu", precision="auto", threads=1)
    (opened,) = devices._accelerators(config, card(folder), {}, ["cpu"])
    assert opened.reopen is not None
    assert opened.reopen.spec.arguments["config"]["precision"] == opened.backend.info.precision
    opened.backend.close()


@NO_GPU
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a quota of one CPU is no limit on one")
@pytest.mark.parametrize("kind", [{}, {"worker_kind": "process"}])
def test_no_more_threads_are_started_than_the_quota_has_time_for(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]
) -> None:
    (tmp_path / "member").write_text("0::/\n")
    (tmp_path / "cpu.max").write_text("70000 100000\n")
    monkeypatch.setattr(cpus, "MEMBERSHIP", tmp_path / "member")
    monkeypatch.setattr(cpus, "GROUPS", tmp_path)
    reasons = reasons_for(tiny_models["bert"], **kind)
    assert reasons["threads"].startswith("1")
    assert reasons["threads"].endswith(f": 1 of {len(os.sched_getaffinity(0))} CPUs are allowed (quota)")


def broken(told: str) -> Any:
    def open_backend(*_: Any) -> Any:
        raise Retryable(f"model 'm': cannot load the weights onto cuda:0 now: {told}")

    return open_backend


def test_where_this_process_lost_its_context_the_next_model_gets_a_worker_process(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU stands for the accelerator."""
    folder, reasons = tiny_models["bert"], {}
    monkeypatch.setattr(devices, "open_backend", broken("CUDA error: an illegal memory access was encountered"))
    (opened,) = devices._accelerators(section(folder, device="cpu", threads=1), card(folder), reasons, ["cpu"])
    try:
        assert isinstance(opened.backend, RemoteBackend)
        assert opened.reopen is not None
        assert len(run(opened.backend, rows(3, 17))) == 2
        assert "a worker process, since this process cannot use it: " in reasons["devices"]
        assert "illegal memory access" in reasons["devices"]
    finally:
        opened.backend.close()


@pytest.mark.parametrize("told", ["CUDA error: out of memory", "CUDA out of memory. Tried", "no CUDA GPUs are there"])
def test_a_device_that_is_full_is_not_tried_from_a_second_process(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    folder = tiny_models["bert"]
    monkeypatch.setattr(devices, "open_backend", broken(told))
    with pytest.raises(Retryable, match=told):
        devices._accelerators(section(folder, device="cpu", threads=1), card(folder), {}, ["cpu"])


class Watched(Clockwork):
    """Notes its lanes."""

    def __init__(self, batch_s: dict[tuple[int, bool], float]) -> None:
        super().__init__(batch_s)
        self.lanes: list[tuple[int, tuple[int, ...]]] = []

    def twin(self, threads: int = 0, cpus: Sequence[int] = ()) -> Any:
        self.lanes.append((threads, tuple(cpus)))
        return super().twin(threads, cpus)


def test_lanes_are_pinned_to_the_cpus_that_they_were_measured_on() -> None:
    backend = Watched({(4, False): 1.0, (2, False): 1.5, (2, True): 1.2, (1, False): 3.8, (1, True): 3.8})
    opened = divided(backend, {}, 0, 4, [1, 3, 4, 6], 100.0, backend.now)
    assert [each.name for each in opened] == ["cpu/0", "cpu/1"]
    measured, chosen = backend.lanes[:-2], backend.lanes[-2:]
    assert chosen == [(2, (1, 3)), (2, (4, 6))]
    assert set(chosen) <= set(measured)
    assert backend.closed


def test_lanes_within_a_quota_are_never_pinned() -> None:
    backend, reasons = Watched({(4, False): 1.0, (2, False): 1.5, (1, False): 3.8}), {}
    opened = divided(backend, reasons, 0, 4, [1, 3, 4, 6], 100.0, backend.now, pins=False)
    assert len(opened) == 2
    assert {pinned for _, pinned in backend.lanes} == {()}


@pytest.mark.parametrize(("wanted", "threads", "each"), [(2, 4, 2), (3, 4, 1), (4, 2, 1)])
def test_lanes_that_are_configured_share_the_threads_and_are_not_pinned(wanted: int, threads: int, each: int) -> None:
    backend, reasons = Watched({}), {}
    opened = divided(backend, reasons, wanted, threads, [0, 1, 2, 3], 1.0)
    assert backend.lanes == [(each, ())] * wanted
    assert len(opened) == wanted
    assert reasons["lanes"] == f"{wanted}: configured"


def test_what_cannot_be_divided_is_one_lane() -> None:
    backend, reasons = FakeBackend(), {}
    assert divided(backend, reasons, 0, 2, [0, 1], 1.0) == [Opened("cpu", backend)]
    assert "does not share" in reasons["lanes"]
    assert not backend.closed


def test_workers_on_nodes_share_the_threads_that_are_configured() -> None:
    nodes = [(0, 1, 2, 3), (4, 5)]
    model = ModelCard("fake", Path(), "0" * 12, "embedding", 64, "mean", (), {})

    def threads(**changes: Any) -> list[int]:
        specs = node_specs(EngineConfig(**changes), model, nodes)
        assert [spec.cpus for spec in specs] == nodes
        return [spec.arguments["threads"] for spec in specs]

    assert threads() == [4, 2]
    assert threads(threads=2) == [1, 1]
    assert threads(threads=1) == [1, 1]
    assert threads(threads=6) == [3, 2]


def test_worker_processes_that_cannot_be_had_leave_the_lanes_at_work(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    lane = Watched({(1, False): 0.0})
    gone = ModelCard("gone", tmp_path / "gone", "0" * 12, "embedding", 64, "mean", (), {})
    reasons: dict[str, str] = {}
    opened = [Opened("cpu/0", lane)]
    # One lane on what is said to be eight CPUs: processes could be eight times as fast.
    found = devices._try_processes(section(tmp_path, device="cpu"), gone, reasons, opened, Cpus(tuple(range(8))), 8)
    assert found == opened
    assert not lane.closed
    assert reasons["workers"].startswith("none: 8 worker processes were tried: ")
    assert len(run(lane, [np.arange(1, 5, dtype=np.int32)])) == 1
