"""The PyTorch backend: opens a model on a device in the form that measured best, and runs it on a CPU.

`open_backend` decides: device, threads, precision, each with its reason; on a CPU `torch_forms` does the most of it.
On CUDA it returns `torch_cuda.CudaBackend`. Foreign errors of memory become `DeviceOutOfMemory`; nothing else is
swallowed.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from engine import models, network, torch_forms
from engine.backend import Backend, BackendInfo, DeviceMemory, DeviceOutOfMemory, Precision
from engine.config import EngineConfig
from engine.cpus import usable_cpus
from engine.models import ModelCard
from engine.torch_forms import Form
from sluice.errors import ConfigError

if TYPE_CHECKING:
    from engine.backend import Outputs, Rows


def open_backend(config: EngineConfig, card: ModelCard, reasons: dict[str, str]) -> Backend:
    """Loads the model and returns it running on the configured device. Call it on the thread that will drive it.

    Args:
        config: the engine's section.
        card: of the model.
        reasons: takes what is decided here, and why.
    """
    device = _device(config.device)
    if device.type == "cpu":
        _set_threads(config.threads, reasons)
    model = models.load_model(card)
    pooling: Literal["mean", "cls"] = card.pooling if config.pooling == "auto" else config.pooling
    length_max = min(config.length_tokens_max or card.length_max, card.length_max)
    reasons["pooling"] = f"{pooling}: {'the model says so' if config.pooling == 'auto' else 'configured'}"
    reasons["length_max"] = f"{length_max} tokens: the model allows {card.length_max}"
    net = network.build(model, card, pooling, length_max)
    reasons["network"] = f"{type(net.encoder).__name__} for {card.config.get('model_type')}"
    del model
    if device.type == "cuda":
        from engine.torch_cuda import CudaBackend

        info = _info(str(device), "fp32", card, net, length_max, depth=2, exact=False)
        with models.translated(card, f"weights onto {device}"):
            net, precision = torch_forms.place(net, device, config.precision, _cuda_candidates(device), reasons)
        if config.compile:
            reasons["compile"] = "not compiled: on CUDA, graphs are replayed instead (engine.cuda_graphs_max)"
        return CudaBackend(net, replace(info, precision=precision), config)
    form, precision = torch_forms.choose(net, config, reasons)
    info = _info("cpu", precision, card, net, length_max, depth=1, exact=True, packed=form.packed)
    return TorchBackend(form, info)


class TorchBackend:
    """A network on the CPU; `submit` computes at once.

    Args:
        form: of the network.
        info: see `Backend`.
        threads: intra-operation threads of the thread that drives it; 0: as that thread has them.
        cpus: that the driving thread is pinned to; none: not pinned.
    """

    def __init__(self, form: Form, info: BackendInfo, threads: int = 0, cpus: Sequence[int] = ()) -> None:
        self._form: Form | None = form
        self._info = info
        self._threads = threads
        self._cpus = tuple(cpus)
        # Shared by twins: which of them the current thread was last set up for.
        self._seat = threading.local()
        self._peak = 0

    @property
    def info(self) -> BackendInfo:
        """See `Backend`."""
        return self._info

    def twin(self, threads: int = 0, cpus: Sequence[int] = ()) -> "TorchBackend":
        """See `lanes.Twinned`. Twins share the weights until the last one is closed."""
        assert self._form is not None, "the backend is closed"
        other = TorchBackend(self._form, self._info, threads, cpus)
        other._seat = self._seat
        return other

    def submit(self, rows: "Rows", length: int) -> object:
        """See `Backend`."""
        assert self._form is not None, "the backend is closed"
        self._sit_down()
        with torch.inference_mode(), translated_memory():
            return self._form.run(rows, length)

    def collect(self, ticket: object) -> "Outputs":
        """See `Backend`."""
        assert isinstance(ticket, list)
        return ticket

    def _sit_down(self) -> None:
        """Sets the calling thread up for this lane: both settings belong to a thread, and OpenMP's follow it.

        Except those that OpenMP started for this thread before: the thread that loaded the model keeps them unpinned.
        """
        if getattr(self._seat, "lane", None) is self:
            return
        self._seat.lane = self
        if self._threads:
            torch.set_num_threads(self._threads)
        if self._cpus:
            with suppress(OSError):  # the CPUs may have been taken from the process since
                os.sched_setaffinity(0, self._cpus)

    def memory(self) -> DeviceMemory:
        """See `Backend`. The peak is that of the samples taken, since a CPU allocator keeps none."""
        import psutil

        used = psutil.Process().memory_info().rss
        self._peak = max(self._peak, used)
        return DeviceMemory(used, used, psutil.virtual_memory().available, self._peak)

    def empty_cache(self) -> None:
        """See `Backend`. The system's allocator holds nothing that we could give back."""
        self._peak = 0

    def close(self) -> None:
        """See `Backend`."""
        self._form = None


@contextmanager
def translated_memory() -> Iterator[None]:
    """Turns PyTorch's ways of saying "out of memory" into DeviceOutOfMemory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceOutOfMemory(str(error).partition("\n")[0]) from error
    except RuntimeError as error:
        # The CPU allocator raises a plain RuntimeError.
        if "can't allocate memory" in str(error) or "not enough memory" in str(error):
            raise DeviceOutOfMemory(str(error).partition("\n")[0]) from error
        raise
    except MemoryError as error:
        raise DeviceOutOfMemory("out of memory") from error


def _device(wanted: str) -> torch.device:
    available = torch.cuda.is_available()
    if wanted == "auto":
        return torch.device("cuda", 0) if available else torch.device("cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"engine.device: '{wanted}' is not auto, cpu, cuda or cuda:N") from error
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"engine.device: '{wanted}' is not auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not available or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"engine.device: '{wanted}' is not there ({torch.cuda.device_count()} CUDA devices)")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _set_threads(wanted: int, reasons: dict[str, str]) -> None:
    usable = usable_cpus()
    threads = wanted or min(usable.count, torch.get_num_threads())
    torch.set_num_threads(threads)
    reasons["threads"] = f"{threads}: {'configured' if wanted else usable.reason}"


def _info(
    device: str,
    precision: Precision,
    card: ModelCard,
    net: network.Network,
    length_max: int,
    *,
    depth: int,
    exact: bool,
    packed: bool = False,
) -> BackendInfo:
    per_token = card.kind == "tokens"
    width = 0 if per_token else int(card.config.get("hidden_size") or card.config.get("dim") or 0)
    if not width and not per_token:
        with torch.inference_mode():
            lengths = torch.ones(1, dtype=torch.int32)
            width = int(net(torch.ones(1, 1, dtype=torch.int32), lengths, full=True).shape[1]) - len(card.labels)
    return BackendInfo(
        device, precision, depth, exact, length_max, width, card.labels, packed=packed, per_token=per_token
    )


def _cuda_candidates(device: torch.device) -> list[Precision]:
    """Half precisions that the tensor cores compute in, the best first.

    They run both at the same rate; fp16 has three more bits of mantissa, bf16 the range of fp32.
    """
    return ["fp16", "bf16"] if torch.cuda.get_device_capability(device) >= (8, 0) else ["fp16"]
