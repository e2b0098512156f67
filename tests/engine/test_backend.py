"""One conformance suite for every backend: the fake device, PyTorch on the CPU and on CUDA, OpenVINO where it is."""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine import backends, models
from engine.backend import Backend, BackendInfo, DeviceLost
from engine.config import CacheConfig, EngineConfig
from engine.remote import RemoteBackend
from tests.engine.fakes import FakeBackend
from tests.engine.fleets import spec

NAMES = ["fake", "bert", "bert-cls", "head", "distilbert", "roberta"]
NO_OPENVINO = pytest.mark.skipif(not backends.installed(), reason="the extra is not installed")
OPENVINO = [pytest.param(f"openvino:{name}", marks=NO_OPENVINO) for name in NAMES[1:]]
# What a GPU runs, on the CPU.
PADDED = [f"padded:{name}" for name in ("bert", "bert-cls", "head")]
GPU = [pytest.param(f"cuda:{name}", marks=pytest.mark.gpu) for name in ("bert", "head", "distilbert")]


@pytest.fixture(params=["worker", *NAMES, *PADDED, *OPENVINO, *GPU])
def backend(request: pytest.FixtureRequest, tiny_models: dict[str, Path], converted: CacheConfig) -> Iterator[Backend]:
    where, _, name = request.param.rpartition(":")
    choices: dict[str, dict[str, Any]] = {
        "openvino": {"backend": "openvino", "threads": 1, "caches": converted},
        "padded": {"packing": "off"},
    }
    choice = choices.get(where, {"device": where or "cpu"})
    opened: Backend
    match name:
        case "fake":
            opened = FakeBackend()
        case "worker":
            opened = RemoteBackend(spec(depth=2))
        case _:
            opened = open_tiny(tiny_models[name], **choice)
    yield opened
    opened.close()
    opened.close()


def open_tiny(folder: Path, **changes: Any) -> Backend:
    config = EngineConfig(**{"model": str(folder), "precision": "fp32", "device": "cpu", "backend": "torch", **changes})
    return backends.open_backend(config, models.read_card(str(folder), folder), {})


def rows(*lengths: int) -> list[np.ndarray]:  # type: ignore[type-arg]
    chance = np.random.default_rng(7)
    return [chance.integers(4, 30, length).astype(np.int32) for length in lengths]


def run(backend: Backend, batch: list[np.ndarray], length: int | None = None) -> list[np.ndarray]:  # type: ignore[type-arg]
    return list(backend.collect(backend.submit(batch, length or max(len(row) for row in batch))))


def same(left: np.ndarray, right: np.ndarray) -> bool:  # type: ignore[type-arg]
    a, b = left.astype(np.float64), right.astype(np.float64)
    return bool(a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.9999)


def test_a_row_does_not_depend_on_its_neighbours_or_its_padding(backend: Backend) -> None:
    batch = rows(3, 17, 1, 40, 8)
    alone = [run(backend, [row])[0] for row in batch]
    longest = backend.info.length_max
    for together in (run(backend, batch), run(backend, batch, longest)):
        assert all(same(one, other) for one, other in zip(alone, together, strict=True))
    assert not same(alone[0], alone[1]), "the test must be able to fail"


def test_what_computes_no_padding_says_so(tiny_models: dict[str, Path]) -> None:
    assert open_tiny(tiny_models["bert"]).info.packed
    assert open_tiny(tiny_models["head"]).info.packed
    assert not open_tiny(tiny_models["bert"], packing="off").info.packed
    assert not open_tiny(tiny_models["distilbert"]).info.packed


def test_order_is_kept_and_the_width_is_as_announced(backend: Backend) -> None:
    batch = rows(*range(2, 20))
    forward, backward = run(backend, batch), run(backend, batch[::-1])
    assert all(same(one, other) for one, other in zip(forward, backward[::-1], strict=True))
    width = backend.info.embedding_width + len(backend.info.labels)
    assert all(row.shape == (width,) for row in forward)
    assert all(row.dtype == (np.float32 if backend.info.labels else np.float16) for row in forward)
    norms = [np.linalg.norm(row[: backend.info.embedding_width].astype(np.float32)) for row in forward]
    np.testing.assert_allclose(norms, 1, atol=2e-3)


def test_as_many_batches_as_announced_may_be_under_way(backend: Backend) -> None:
    batches = [rows(5, 9)[::step] for step in (1, -1)] * 2
    expected = [run(backend, batch) for batch in batches]
    tickets: list[object] = []
    got = []
    for batch in batches:
        if len(tickets) == backend.info.depth:
            got.append(list(backend.collect(tickets.pop(0))))
        tickets.append(backend.submit(batch, 9))
    got += [list(backend.collect(ticket)) for ticket in tickets]
    for one, other in zip(expected, got, strict=True):
        assert all(same(a, b) for a, b in zip(one, other, strict=True))


def test_outputs_are_the_callers_for_good(backend: Backend) -> None:
    first = run(backend, rows(7, 7))
    kept = [row.copy() for row in first]
    for _ in range(4):
        run(backend, rows(9, 9))
    assert all((row == copy).all() for row, copy in zip(first, kept, strict=True))


@pytest.mark.parametrize(("alive", "raised"), [(True, RuntimeError), (False, DeviceLost)])
def test_an_error_of_a_cuda_context_that_is_dead_is_a_lost_device(
    alive: bool, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from engine.torch_cuda import CudaBackend, _Slot, _Ticket

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr("torch.cuda.synchronize", (lambda _: None) if alive else fail)
    slot = object.__new__(_Slot)  # neither can be made without a GPU
    slot.busy, slot.fill, slot.done = False, fail, SimpleNamespace(synchronize=fail)  # type: ignore[assignment, method-assign]
    backend = object.__new__(CudaBackend)
    backend._device, backend._slots = torch.device("cuda", 0), [slot]
    backend._info = BackendInfo("cuda:0", "fp32", 2, exact_lengths=False, length_max=64, embedding_width=32)
    with pytest.raises(raised, match="device-side assert"):
        backend.submit(rows(3), 3)
    with pytest.raises(raised, match="device-side assert"):
        backend.collect(_Ticket(slot, torch.empty(0), 1))
    backend._net = object()  # type: ignore[assignment]
    backend._graphs = OrderedDict()
    if not alive:
        backend.close()
        backend.close()


@pytest.mark.parametrize(("texts", "computed"), [(1, 1), (3, 4), (33, 48), (48, 48), (1025, 1025)])
def test_a_cuda_batch_is_filled_up_by_as_many_rows_as_is_told(
    texts: int, computed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.torch_cuda import ROW_LADDER, CudaBackend, _Slot

    seen: list[int] = []

    def fill(rows: Any, padded_rows: int, length: int) -> None:
        seen.append(padded_rows)
        raise RuntimeError("far enough")

    monkeypatch.setattr("torch.cuda.synchronize", lambda _: None)
    slot = object.__new__(_Slot)  # neither can be made without a GPU
    slot.busy, slot.fill = False, fill  # type: ignore[method-assign]
    backend = object.__new__(CudaBackend)
    backend._device, backend._slots = None, [slot]  # type: ignore[assignment]
    backend._info = BackendInfo("cuda:0", "fp16", 2, False, 64, 32, row_steps=ROW_LADDER)
    with pytest.raises(RuntimeError, match="far enough"):
        backend.submit(rows(*[5] * texts), 8)
    assert seen == [computed]
    assert backend.info.computed([5] * texts, 8) == [8] * computed


@pytest.mark.gpu
def test_rows_are_filled_up_where_graphs_are_replayed_and_not_elsewhere(tiny_models: dict[str, Path]) -> None:
    assert open_tiny(tiny_models["bert"], device="cuda").info.filled(33) == 48
    assert open_tiny(tiny_models["bert"], device="cuda", cuda_graphs_max=0).info.filled(33) == 33


def test_every_shape_runs_and_memory_is_told(backend: Backend) -> None:
    for count, length in ((1, 1), (1, backend.info.length_max), (33, 5), (64, 16), (5, 8), (33, 5)):
        assert len(run(backend, rows(*[length] * count))) == count
    backend.empty_cache()
    assert backend.memory().free > 0
