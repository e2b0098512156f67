"""The PyTorch backend: opens a model on a device in the precision that measured best, and runs it on a CPU.

`open_backend` decides: device, threads, precision, each with its reason. On CUDA it returns
`torch_cuda.CudaBackend`. Foreign errors of memory become `DeviceOutOfMemory`; nothing else is swallowed.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from engine import models, network
from engine.backend import Backend, BackendInfo, DeviceMemory, DeviceOutOfMemory, Precision
from engine.config import EngineConfig
from engine.models import ModelCard
from sluice.errors import ConfigError

if TYPE_CHECKING:
    from engine.backend import Outputs, Rows

DTYPES: Final[dict[Precision, torch.dtype]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# Half precision must be worth its rounding, and must agree with fp32 on the probe texts.
SPEEDUP_MIN: Final = 1.15
AGREEMENT_MIN: Final = 0.999
PROBE_ROWS, PROBE_LENGTH = 16, 48


def open_backend(config: EngineConfig, card: ModelCard, reasons: dict[str, str]) -> Backend:
    """Loads the model and returns it running on the configured device. Call it on the thread that will drive it.

    Args:
        config: the engine's section.
        card: of the model.
        reasons: takes what is decided here, and why.
    """
    device = _device(config.device, reasons)
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

        precision = _cuda_precision(config, reasons)
        info = _info(str(device), precision, card, net, length_max, depth=2, exact=False)
        return CudaBackend(net.to(device, DTYPES[precision]), info, config)
    net, precision = _cpu_precision(net, config, reasons)
    return TorchBackend(net, _info("cpu", precision, card, net, length_max, depth=1, exact=True))


class TorchBackend:
    """A network on the CPU; `submit` computes at once.

    Args:
        net: in evaluation mode.
        info: see `Backend`.
    """

    def __init__(self, net: network.Network, info: BackendInfo) -> None:
        self._net: network.Network | None = net
        self._info = info
        self._peak = 0

    @property
    def info(self) -> BackendInfo:
        """See `Backend`."""
        return self._info

    def submit(self, rows: "Rows", length: int) -> object:
        """See `Backend`."""
        assert self._net is not None, "the backend is closed"
        ids, lengths = pad(rows, length)
        with torch.inference_mode(), translated_memory():
            return self._net(torch.from_numpy(ids), torch.from_numpy(lengths), full=bool((lengths == length).all()))

    def collect(self, ticket: object) -> "Outputs":
        """See `Backend`."""
        assert isinstance(ticket, Tensor)
        return list(ticket.numpy())

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
        self._net = None


def pad(rows: "Rows", length: int) -> tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]:
    """Rows as one int32 [rows, length], zeros behind each, and their lengths (int32).

    The id of the padding does not matter: it is masked out of attention and of pooling.
    """
    ids = np.zeros((len(rows), length), np.int32)
    lengths = np.fromiter((len(row) for row in rows), np.int32, len(rows))
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids, lengths


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


def _device(wanted: str, reasons: dict[str, str]) -> torch.device:
    available = torch.cuda.is_available()
    if wanted == "auto":
        reasons["device"] = "cuda:0: a GPU is there" if available else "cpu: no CUDA device is there"
        return torch.device("cuda", 0) if available else torch.device("cpu")
    reasons["device"] = f"{wanted}: configured"
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
    allowed = len(os.sched_getaffinity(0))
    threads = wanted or min(allowed, torch.get_num_threads())
    torch.set_num_threads(threads)
    why = "configured" if wanted else f"{allowed} CPUs are allowed"
    reasons["threads"] = f"{threads}: {why}"


def _info(
    device: str,
    precision: Precision,
    card: ModelCard,
    net: network.Network,
    length_max: int,
    *,
    depth: int,
    exact: bool,
) -> BackendInfo:
    width = int(card.config.get("hidden_size") or card.config.get("dim") or 0)
    if not width:
        width = _probe(net, length_max)().shape[1] - len(card.labels)
    return BackendInfo(device, precision, depth, exact, length_max, width, card.labels)


def _cuda_precision(config: EngineConfig, reasons: dict[str, str]) -> Precision:
    if config.precision != "auto":
        reasons["precision"] = f"{config.precision}: configured"
        return config.precision
    # Tensor cores run both at the same rate; fp16 has three more bits of mantissa, bf16 the range of fp32.
    # Encoders' activations stay within fp16's range, and their outputs are float16 anyway.
    reasons["precision"] = "fp16: tensor cores"
    return "fp16"


def _cpu_precision(
    net: network.Network, config: EngineConfig, reasons: dict[str, str]
) -> tuple[network.Network, Precision]:
    if config.precision != "auto":
        reasons["precision"] = f"{config.precision}: configured"
        return net.to(DTYPES[config.precision]), config.precision
    import copy

    length_max = net.keep_table.shape[1]
    best, chosen, best_s, notes = net, "fp32", float("inf"), []
    for name in _cpu_candidates():
        half = copy.deepcopy(net).to(DTYPES[name])
        # Side by side, so that other work on the machine slows both.
        (reference, full_s), (output, half_s) = _measure(_probe(net, length_max), _probe(half, length_max))
        agreement = float(torch.nn.functional.cosine_similarity(output.float(), reference.float()).min())
        notes.append(f"{name} {half_s * 1e3:.1f} ms against {full_s * 1e3:.1f} ms (cosine {agreement:.5f})")
        if half_s < min(best_s, full_s / SPEEDUP_MIN) and agreement >= AGREEMENT_MIN:
            best, chosen, best_s = half, name, half_s
    measured = f"measured {', '.join(notes)} for {PROBE_ROWS} texts of {PROBE_LENGTH} tokens"
    reasons["precision"] = f"{chosen}: {measured if notes else 'the CPU has no instructions for less'}"
    return best, chosen  # type: ignore[return-value] # mypy widens the literal


def _cpu_candidates() -> list[Precision]:
    """Half precisions that the CPU has instructions for."""
    has = torch.cpu.get_capabilities()
    candidates: list[Precision] = []
    if has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"):
        candidates.append("bf16")
    if has.get("avx512_fp16") or has.get("amx_fp16"):
        candidates.append("fp16")
    return candidates


def _probe(net: network.Network, length_max: int) -> Callable[[], Tensor]:
    """A batch of typical size on `net`; deterministic, so that two networks can be compared."""
    length = min(PROBE_LENGTH, length_max)
    seeded = torch.Generator().manual_seed(7)
    # Small ids exist in every vocabulary.
    ids = torch.randint(1, 50, (PROBE_ROWS, length), generator=seeded, dtype=torch.int32)
    lengths = torch.full((PROBE_ROWS,), length, dtype=torch.int32)

    def run() -> Tensor:
        with torch.inference_mode():
            output: Tensor = net(ids, lengths, full=True)
            return output

    return run


def _measure(*runs: Callable[[], Tensor], times: int = 4) -> list[tuple[Tensor, float]]:
    """Output and least time in seconds of each, run in turns after one round that warms up."""
    outputs = [run() for run in runs]
    least = [float("inf")] * len(runs)
    for _ in range(times):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            least[i] = min(least[i], time.perf_counter() - start)
    return list(zip(outputs, least, strict=True))
