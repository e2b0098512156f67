"""Measures at start-up what batches cost on this device, and how much memory they take.

Shapes are tried in an order in which an early stop still leaves a usable fit: launch cost, cost per token,
then attention and rows. Each is warmed up once and the least of a few runs counts, since other work on the
machine only adds time.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from engine.backend import Backend, DeviceOutOfMemory
from engine.buckets import Ladder
from engine.cost import Sample
from engine.memory import Admission

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Rows and length in tokens.
SHAPES: Final = ((1, 16), (16, 48), (1, 128), (4, 16), (4, 256), (32, 16), (1, 48), (8, 128), (1, 256), (64, 16))
RUNS: Final = 3


def measure_costs(
    backend: Backend, ladder: Ladder, seconds_max: float, clock: Callable[[], float] = time.perf_counter
) -> list[Sample]:
    """Samples for the cost model, taken for at most about `seconds_max` seconds, at least two."""
    samples: dict[tuple[int, int], float] = {}
    end = clock() + seconds_max
    for rows, wanted in SHAPES:
        length = ladder.edge(min(wanted, backend.info.length_max))
        if (rows, length) in samples:
            continue
        if len(samples) >= 2 and clock() >= end:
            break
        try:
            samples[rows, length] = _least_s(backend, rows, length, clock)
        except DeviceOutOfMemory:
            backend.empty_cache()
    return [(rows, length, seconds) for (rows, length), seconds in samples.items()]


def measure_memory(backend: Backend, admission: Admission, ladder: Ladder, share: float) -> None:
    """Finds how many padded tokens fit, by growing batches up to the admission's limit; lowers the limit if need be.

    Only where the device tells peaks apart (not on a CPU, whose allocator keeps none).
    """
    if backend.info.device == "cpu":
        return
    length = ladder.edges[-1]
    rows, most = 1, max(1, admission.tokens_max // length)
    while True:
        backend.empty_cache()
        rest = backend.memory()
        try:
            backend.collect(backend.submit([_row(length)] * rows, length))
        except DeviceOutOfMemory:
            admission.failed(rows * length)
            backend.empty_cache()
            return
        used = backend.memory().peak - rest.allocated
        admission.observe_peak(rows * length, used, rest.free, share)
        if rows >= most or admission.tokens_max < 2 * rows * length:
            return
        rows = min(2 * rows, most)


def _least_s(backend: Backend, rows: int, length: int, clock: Callable[[], float]) -> float:
    batch = [_row(length)] * rows
    least = float("inf")
    for run in range(RUNS + 1):
        start = clock()
        backend.collect(backend.submit(batch, length))
        if run:
            least = min(least, clock() - start)
    return least


def _row(length: int) -> "npt.NDArray[np.int32]":
    import numpy as np

    # Small ids exist in every vocabulary. What they mean does not change the cost.
    return np.arange(length, dtype=np.int32) % 50 + 1
