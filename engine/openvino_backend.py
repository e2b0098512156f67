"""The OpenVINO backend: an encoder on the CPU.

One infer request is one lane, driven by one thread. Lanes with the same number of threads share one compiled model
(its streams), so that a further lane costs its scratch memory only; with one thread a lane computes on the thread
that drives it. Threads are never pinned by OpenVINO, which would pin them to the same first CPUs in every process;
`twin` pins the driving thread where a lane is given CPUs.

Precision: weights and results are PyTorch's; `fp32`, or `bf16` and `fp16` where the plugin has them and they are
measured faster and agree. Never int8: it changes results.

Fails: `DeviceOutOfMemory` for memory; nothing else is swallowed.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Self

from engine import openvino_model
from engine.backend import BackendInfo, DeviceMemory, DeviceOutOfMemory, Precision
from engine.config import EngineConfig
from engine.cpus import usable_cpus
from engine.models import ModelCard
from engine.packing import cut, pad
from engine.probe import AGREEMENT_MIN, PROBE_LENGTH, PROBE_ROWS, SPEEDUP_MIN, measure, probe_batch
from engine.torch_forms import least_cosine

if TYPE_CHECKING:
    from engine.backend import Outputs, Rows

HINTS: Final[dict[Precision, str]] = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
# What the plugin calls the precisions that it has instructions for.
_CAPABILITIES: Final[dict[Precision, str]] = {"bf16": "BF16", "fp16": "FP16"}
_NO_MEMORY: Final = ("bad_alloc", "not enough memory", "can't allocate", "cannot allocate", "failed to allocate")


def open_backend(config: EngineConfig, card: ModelCard, reasons: dict[str, str]) -> "OpenvinoBackend":
    """Converts the model, or reads it where it is kept, and returns it running on the CPU.

    Args:
        config: the engine's section.
        card: of the model; an encoder.
        reasons: takes what is decided here, and why.

    Raises:
        Permanent: the model is damaged, or cannot be converted.
    """
    openvino = openvino_model.library()
    core = openvino_model.shared_core()
    wanted = openvino_model.source(config, card)
    model, origin = openvino_model.load(core, wanted, config.caches.directory)
    usable = usable_cpus()
    threads = config.threads or usable.count
    reasons["device"] = f"cpu: {core.get_property('CPU', 'FULL_DEVICE_NAME')}"
    reasons["threads"] = f"{threads}: {'configured' if config.threads else usable.reason}"
    reasons["pooling"] = f"{wanted.pooling}: {'the model says so' if config.pooling == 'auto' else 'configured'}"
    reasons["length_max"] = f"{wanted.length_max} tokens: the model allows {card.length_max}"
    reasons["network"] = f"OpenVINO {openvino.__version__.partition('-')[0]}: {origin}"
    shape = model.outputs[0].get_partial_shape()
    per_token = len(shape) == 3
    width = 0 if per_token else shape[1].get_length() - len(card.labels)
    info = BackendInfo("cpu", "fp32", 1, True, wanted.length_max, width, card.labels, per_token=per_token)
    if config.precision != "auto":
        reasons["precision"] = f"{config.precision}: configured"
        return _open(core, model, replace(info, precision=config.precision), threads)
    return _by_measurement(core, model, info, threads, reasons)


class Streams:
    """The compiled forms of one model, one for each number of threads that lanes ask for. For several threads.

    Args:
        core: `openvino.Core`.
        model: `openvino.Model`.
        precision: that it computes in.
    """

    def __init__(self, core: Any, model: Any, precision: Precision) -> None:
        self._core = core
        self._model = model
        self._hint = HINTS[precision]
        self._lock = threading.Lock()
        self._lanes: dict[int, int] = {}  # lanes open, by threads
        self._compiled: dict[int, Any] = {}
        self._free: dict[int, int] = {}  # streams of `_compiled` that no lane has taken

    def join(self, threads: int) -> None:
        """A lane of so many threads is there."""
        with self._lock:
            self._lanes[threads] = self._lanes.get(threads, 0) + 1

    def leave(self, threads: int) -> None:
        """A lane is gone. The last one of its kind takes the compiled model with it, and the last of all the model."""
        with self._lock:
            self._lanes[threads] -= 1
            if not self._lanes[threads]:
                del self._lanes[threads]
                self._compiled.pop(threads, None)
                self._free.pop(threads, None)
            if not self._lanes:
                self._model = None

    def take(self, threads: int) -> tuple[Any, Any]:
        """A stream for one lane: the compiled model and an infer request on it.

        Streams are counted when the model is compiled: one for every lane of this many threads that is open then.
        """
        with self._lock:
            if not self._free.get(threads):
                self._free[threads] = self._lanes[threads]
                self._compiled[threads] = self._compile(threads, self._lanes[threads])
            self._free[threads] -= 1
            compiled = self._compiled[threads]
        return compiled, compiled.create_infer_request()

    def _compile(self, threads: int, streams: int) -> Any:
        assert self._model is not None, "the backend is closed"
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self._hint,
            "INFERENCE_NUM_THREADS": threads * streams,
            "NUM_STREAMS": streams,
            "ENABLE_CPU_PINNING": False,
        }
        with translated_memory():
            return self._core.compile_model(self._model, "CPU", settings)


class OpenvinoBackend:
    """One lane on a compiled model; `submit` computes at once.

    Args:
        streams: that it takes one of.
        info: see `Backend`.
        threads: that compute.
        cpus: that the driving thread is pinned to, at the first batch; none: not pinned.
    """

    def __init__(self, streams: Streams, info: BackendInfo, threads: int, cpus: Sequence[int] = ()) -> None:
        self._streams: Streams | None = streams
        self._info = info
        self._threads = threads
        self._cpus = tuple(cpus)
        self._compiled: Any = None
        self._request: Any = None
        self._peak = 0
        streams.join(threads)

    @property
    def info(self) -> BackendInfo:
        """See `Backend`."""
        return self._info

    def twin(self, threads: int = 0, cpus: Sequence[int] = ()) -> Self:
        """See `lanes.Twinned`."""
        assert self._streams is not None, "the backend is closed"
        return type(self)(self._streams, self._info, threads or self._threads, cpus)

    def submit(self, rows: "Rows", length: int) -> object:
        """See `Backend`."""
        ids, lengths = pad(rows, length)
        request = self._started()
        with translated_memory():
            # The inputs are ours and live until the end of the call; the outputs are copied.
            outputs = request.infer([ids, lengths], share_inputs=True, share_outputs=False)[0]
        return outputs, lengths

    def collect(self, ticket: object) -> "Outputs":
        """See `Backend`."""
        assert isinstance(ticket, tuple)
        outputs, lengths = ticket
        return cut(outputs, lengths.tolist())

    def memory(self) -> DeviceMemory:
        """See `Backend`. The peak is that of the samples taken, since a CPU allocator keeps none."""
        import psutil

        used = psutil.Process().memory_info().rss
        self._peak = max(self._peak, used)
        return DeviceMemory(used, used, psutil.virtual_memory().available, self._peak)

    def empty_cache(self) -> None:
        """See `Backend`: gives back the scratch memory of the largest batch so far."""
        self._peak = 0
        if self._compiled is not None:
            self._compiled.release_memory()

    def close(self) -> None:
        """See `Backend`."""
        self._request = self._compiled = None
        if self._streams is not None:
            self._streams.leave(self._threads)
            self._streams = None

    def _started(self) -> Any:
        """The infer request; at the first batch of the thread that drives this lane."""
        if self._request is None:
            assert self._streams is not None, "the backend is closed"
            if self._cpus:
                os.sched_setaffinity(0, self._cpus)
            self._compiled, self._request = self._streams.take(self._threads)
        return self._request


@contextmanager
def translated_memory() -> Iterator[None]:
    """Turns OpenVINO's ways of saying "out of memory" into DeviceOutOfMemory."""
    try:
        yield
    except MemoryError as error:
        raise DeviceOutOfMemory("out of memory") from error
    except RuntimeError as error:
        if any(each in str(error).lower() for each in _NO_MEMORY):
            raise DeviceOutOfMemory(str(error).strip().rpartition("\n")[2]) from error
        raise


def _open(core: Any, model: Any, info: BackendInfo, threads: int) -> OpenvinoBackend:
    return OpenvinoBackend(Streams(core, model, info.precision), info, threads)


def _by_measurement(core: Any, model: Any, info: BackendInfo, threads: int, reasons: dict[str, str]) -> OpenvinoBackend:
    """fp32, or the fastest half precision that is worth its rounding."""
    best = _open(core, model, info, threads)
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    full, best_s, notes = best, float("inf"), []
    for name in [each for each, capability in _CAPABILITIES.items() if capability in capabilities]:
        half = _open(core, model, replace(info, precision=name), threads)
        (reference, full_s), (output, half_s) = measure(_probe(full), _probe(half))
        agreement = least_cosine(output, reference)
        notes.append(f"{name} {half_s * 1e3:.1f} ms against {full_s * 1e3:.1f} ms (cosine {agreement:.5f})")
        if half_s < min(best_s, full_s / SPEEDUP_MIN) and agreement >= AGREEMENT_MIN:
            best, half, best_s = half, best, half_s
        if half is not full:
            half.close()
    if best is not full:
        full.close()
    measured = f"measured {', '.join(notes)} for {PROBE_ROWS} texts of {PROBE_LENGTH} tokens"
    reasons["precision"] = f"{best.info.precision}: {measured if notes else 'the CPU has no instructions for less'}"
    return best


def _probe(backend: OpenvinoBackend) -> "Callable[[], Outputs]":
    rows = probe_batch(backend.info.length_max)
    return lambda: backend.collect(backend.submit(rows, len(rows[0])))
