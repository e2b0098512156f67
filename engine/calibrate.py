"""Measures at start-up what batches cost on this device, and how much memory they take.

Shapes are tried in an order in which an early stop still leaves a usable fit: launch cost, cost per token,
then attention and rows. Each is warmed up once and the least of a few runs counts, since other work on the
machine only adds time; a slow device repeats less, so that it sees the same shapes.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from engine.backend import Backend, DeviceOutOfMemory
from engine.buckets import Ladder, reporting_class
from engine.config import REPORTING_CLASSES, EngineConfig
from engine.cost import CostTracker, Sample, relative_error
from engine.devices import Opened
from engine.fleet import Device
from engine.memory import Admission
from engine.remote import RemoteBackend

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Rows and length in tokens.
SHAPES: Final = ((1, 16), (16, 48), (1, 128), (4, 16), (4, 256), (32, 16), (1, 48), (8, 128), (1, 256), (64, 16))
# Where a batch of those is little more than a launch.
SHAPES_GPU: Final = ((64, 128), (128, 256))
# Lengths of a packed batch: each a few times, as neighbours in a queue are.
MIXED: Final = (9, 9, 12, 12, 15, 18, 18, 21, 24, 30, 36, 48, 64, 96, 160, 224)
RUNS: Final = 3
# Above this mean error of the fit, other work on the machine is the likelier cause. On a quiet one it is 1 to 6%.
ERROR_MAX: Final = 0.15
BUSY: Final = ": was the machine busy? Measure again when it is quiet, or set batch_tokens, precision and workers"


def measure_devices(
    config: EngineConfig, opened: Sequence[Opened], ladder: Ladder, reasons: dict[str, str]
) -> list[Device]:
    """Gives each device its cost model and its limit of memory, measured here.

    Lanes of a CPU are alike: the first is measured, and they share a cost model from then on. Other devices are
    measured each, side by side where they are in processes of their own.

    Args:
        config: the engine's section.
        opened: backends, the first of them driven by the calling thread.
        ladder: the buckets.
        reasons: takes what was found, of the first device.
    """
    alike = all(each.backend.info == opened[0].backend.info for each in opened)
    alike = alike and opened[0].backend.info.device == "cpu"
    devices = [_measured(config, opened[0], ladder, reasons)]
    first = devices[0]
    if alike:
        tokens_max = first.admission.tokens_max
        return devices + [_device(each, first.costs, Admission(tokens_max)) for each in opened[1:]]
    if all(isinstance(each.backend, RemoteBackend) for each in opened) and len(opened) > 1:
        with ThreadPoolExecutor(len(opened) - 1) as pool:
            return devices + list(pool.map(lambda each: _measured(config, each, ladder, {}), opened[1:]))
    return devices + [_measured(config, each, ladder, {}) for each in opened[1:]]


def _measured(config: EngineConfig, opened: Opened, ladder: Ladder, reasons: dict[str, str]) -> Device:
    samples = measure_costs(opened.backend, ladder, config.fit_seconds_max)
    costs = CostTracker(samples)
    reasons["cost"] = _cost_reason(costs, samples)
    admission = Admission(_budget(config, costs, reasons))
    device = _device(opened, costs, admission)
    device.peaks = measure_memory(opened.backend, admission, ladder, config.memory_share_max, config.batch_rows_max)
    reasons["memory"] = _memory_reason(admission)
    return device


def _device(opened: Opened, costs: CostTracker, admission: Admission) -> Device:
    return Device(opened.name, opened.backend, costs, admission, opened.reopen)


def measure_costs(
    backend: Backend, ladder: Ladder, seconds_max: float, clock: Callable[[], float] = time.perf_counter
) -> list[Sample]:
    """Samples for the cost model, taken for at most about `seconds_max` seconds, at least two."""
    info = backend.info
    shapes = SHAPES if info.device == "cpu" else SHAPES + SHAPES_GPU
    batches = [[ladder.edge(min(length, info.length_max))] * rows for rows, length in shapes]
    if info.packed:
        batches.insert(4, [min(length, info.length_max) for length in MIXED])
    samples: dict[tuple[int, ...], Sample] = {}
    end = clock() + seconds_max
    each_s = seconds_max / len(batches)
    for lengths in batches:
        if tuple(lengths) in samples:
            continue
        if len(samples) >= 2 and clock() >= end:
            break
        try:
            seconds = _least_s(backend, lengths, each_s, clock)
        except DeviceOutOfMemory:
            backend.empty_cache()
        else:
            samples[tuple(lengths)] = Sample(len(lengths), sum(lengths), sum(n * n for n in lengths), seconds)
    return list(samples.values())


def measure_memory(
    backend: Backend, admission: Admission, ladder: Ladder, share: float, rows_max: int = 1 << 16
) -> dict[int, int]:
    """Finds the largest batch that is safe: the longest rows, twice as many each time, until memory or limit ends it.

    Then a batch of each shorter reporting class at that limit, since short rows may take more per token. Lowers the
    admission's limit if need be. Only where the device tells peaks apart (not on a CPU, whose allocator keeps none).

    Returns:
        Bytes at the peak, per reporting class that ran; empty where it is not measured.
    """
    if backend.info.device == "cpu":
        return {}
    longest = ladder.edges[-1]
    peaks: dict[int, int] = {}
    rows = 1
    while (peak := _peak(backend, admission, rows, longest, share)) is not None:
        peaks[reporting_class(longest, REPORTING_CLASSES)] = peak
        most = min(rows_max, admission.tokens_max // longest)
        if rows >= most:
            break
        rows = min(2 * rows, most)
    for length in reversed([each for each in REPORTING_CLASSES if each < longest]):
        rows = 0
        # A failure lowers the limit; then fewer rows are tried.
        while (most := max(1, min(rows_max, admission.tokens_max // length))) != rows:
            rows = most
            if (peak := _peak(backend, admission, rows, length, share)) is not None:
                peaks[length] = peak
                break
    backend.empty_cache()
    return peaks


def _peak(backend: Backend, admission: Admission, rows: int, length: int, share: float) -> int | None:
    """Bytes that a batch takes above rest, taken into the admission; None when it does not fit."""
    backend.empty_cache()
    rest = backend.memory()
    try:
        backend.collect(backend.submit([_row(length)] * rows, length))
    except DeviceOutOfMemory:
        admission.failed(rows * length)
        backend.empty_cache()
        return None
    used = max(0, backend.memory().peak - rest.allocated)
    admission.observe_peak(rows * length, used, rest.free, share)
    return used


def _least_s(backend: Backend, lengths: Sequence[int], seconds_max: float, clock: Callable[[], float]) -> float:
    """The least time of RUNS runs after one that warms up; of fewer once `seconds_max` have passed, at least one."""
    batch = [_row(length) for length in lengths]
    least = float("inf")
    end = clock() + seconds_max
    for run in range(RUNS + 1):
        start = clock()
        if run > 1 and start >= end:
            break
        backend.collect(backend.submit(batch, max(lengths)))
        if run:
            least = min(least, clock() - start)
    return least


def _row(length: int) -> "npt.NDArray[np.int32]":
    import numpy as np

    # Small ids exist in every vocabulary. What they mean does not change the cost.
    return np.arange(length, dtype=np.int32) % 50 + 1


def _budget(config: EngineConfig, costs: CostTracker, reasons: dict[str, str]) -> int:
    if config.batch_tokens != "auto":
        reasons["batch_tokens"] = f"{config.batch_tokens}: configured"
        return config.batch_tokens
    budget = costs.model.budget_tokens()
    reasons["batch_tokens"] = (
        f"{budget}: a larger batch gains less than 5%, or lasts longer than online texts should wait"
    )
    return budget


def _cost_reason(costs: CostTracker, samples: Sequence[Sample]) -> str:
    model = costs.model
    return (
        f"{model.launch_s * 1e3:.2f} ms a batch + {model.token_s * 1e6:.1f} us a token + "
        f"{model.attention_s * 1e9:.2f} ns a token pair + {model.row_s * 1e6:.1f} us a row; "
        f"{len(samples)} shapes measured, mean error {(error := relative_error(model, samples)):.0%}"
        f"{BUSY if error > ERROR_MAX else ''}"
    )


def _memory_reason(admission: Admission) -> str:
    if not admission.bytes_per_token:
        return "not measured on a CPU; lowered when memory runs out"
    return (
        f"{admission.bytes_per_token / 1024:.1f} KiB a token at the peak, at most {admission.tokens_max} tokens a batch"
    )
