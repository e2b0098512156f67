"""By what a model is told from any other one, and what is no damage."""

import errno
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import loading, models, torch_backend
from engine.config import EngineConfig
from engine.model_files import WHOLE_BYTES_MAX, weights_digest
from engine.models import ModelCard
from sluice.errors import Permanent, Retryable

LIMITS = [WHOLE_BYTES_MAX, 0]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Four tensors of 256 KiB and a small one."""
    return save(tmp_path / "model.safetensors", lambda content: None)


def save(file: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    import torch
    from safetensors.torch import save_file

    content = {f"layer.{i}": torch.full((256, 256), float(i)) for i in range(4)} | {"layer.2.bias": torch.zeros(8)}
    change(content)
    save_file(content, file)
    return file


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", ["layer.1", "layer.2", "layer.2.bias"])
def test_a_trained_tensor_within_makes_another_model(weights: Path, tmp_path: Path, limit: int, name: str) -> None:
    other = save(tmp_path / "other.safetensors", lambda content: content[name].add_(1e-3))
    assert other.stat().st_size == weights.stat().st_size
    assert weights_digest([weights], limit) != weights_digest([other], limit)
    assert weights_digest([weights], limit) == weights_digest([Path(shutil.copy(weights, other))], limit)


@pytest.mark.parametrize("limit", LIMITS)
def test_names_and_parts_count(weights: Path, tmp_path: Path, limit: int) -> None:
    def rename(content: dict[str, Any]) -> None:
        content["layer.0"], content["layer.1"] = content["layer.1"], content["layer.0"]

    other = save(tmp_path / "other.safetensors", rename)
    digests = {weights_digest(files, limit) for files in ([weights], [other], [weights, other], [other, weights])}
    assert len(digests) == 4


def test_a_single_bit_counts_up_to_the_limit_and_of_larger_files_little_is_read(weights: Path) -> None:
    content = bytearray(weights.read_bytes())
    # Between the samples of the last tensor.
    place = len(content) - 60_000
    before = [weights_digest([weights], limit) for limit in LIMITS]
    content[place] ^= 1
    weights.write_bytes(content)
    after = [weights_digest([weights], limit) for limit in LIMITS]
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True]


@pytest.mark.parametrize(
    "header",
    [b"", b"\xff" * 8, b"\xff" * 7 + b"\x7f{}", b"\x02" + bytes(7) + b"[]", b"\x05" + bytes(7) + b'{"a":'],
)
def test_a_damaged_header_ends_nothing(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(header + bytes(100))
    assert len(weights_digest([tmp_path / "model.safetensors"], 0)) == 32


def _of_machine() -> list[BaseException]:
    import torch

    return [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OSError(errno.EMFILE, "Too many open files"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("The NVIDIA driver on your system is too old"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    ]


@pytest.mark.parametrize("place", range(7))
def test_want_of_memory_and_a_failing_device_are_not_called_damage(tiny_models: dict[str, Path], place: int) -> None:
    error = _of_machine()[place]
    card: ModelCard = models.read_card("m", tiny_models["bert"])
    told = r"cannot load the weights now: .*the files may be in order"
    with pytest.raises(Retryable, match=told), models.translated(card, "weights"):
        raise error
    with pytest.raises(type(error)) as raised, loading._runnable(card):
        raise error
    assert raised.value is error


def test_damage_is_still_called_so(tiny_models: dict[str, Path]) -> None:
    card = models.read_card("m", tiny_models["bert"])
    for error in (RuntimeError("Error(s) in loading state_dict"), OSError("no file named model.safetensors")):
        with pytest.raises(Permanent, match="copy or download"), models.translated(card, "weights"):
            raise error


def test_a_header_that_claims_more_than_one_can_have_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.model_files._HEADER_BYTES_MAX", 1000)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\xff" * 7 + b"\x7f" + bytes(8 << 20))
    tracemalloc.start()
    try:
        weights_digest([file], 0)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_no_room_for_the_weights_on_the_device_is_no_damage(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("engine.torch_backend._device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("engine.torch_backend._cuda_candidates", lambda _: ["fp16"])
    monkeypatch.setattr(torch.nn.Module, "to", full)
    card = models.read_card(str(tiny_models["bert"]), tiny_models["bert"])
    with pytest.raises(Retryable, match=r"cannot load the weights onto cuda now: .*out of memory.* free memory"):
        torch_backend.open_backend(EngineConfig(device="cuda"), card, {})
