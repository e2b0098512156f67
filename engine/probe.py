"""The batch that choices at start-up are measured with, and how: in turns, the least time counts. Pure.

In turns, so that other work on the machine slows all candidates alike; the least, since it only ever adds time.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from engine.backend import Rows

# A typical batch of log lines; 768 tokens are enough for the kernels to run at their full speed.
PROBE_ROWS: Final = 16
PROBE_LENGTH: Final = 48
# Half precision must be worth its rounding, and must agree with fp32: the least cosine of the outputs.
SPEEDUP_MIN: Final = 1.15
AGREEMENT_MIN: Final = 0.999

T = TypeVar("T")


def probe_batch(length_max: int) -> "Rows":
    """PROBE_ROWS rows of PROBE_LENGTH ids, or as long as the model allows; always the same ones."""
    import numpy as np

    # Small ids exist in every vocabulary.
    chance = np.random.default_rng(7)
    return list(chance.integers(1, 50, (PROBE_ROWS, min(PROBE_LENGTH, length_max)), dtype=np.int32))


def measure(
    *runs: Callable[[], T], times: int = 4, clock: Callable[[], float] = time.perf_counter
) -> list[tuple[T, float]]:
    """Output and least time in seconds of each, run in turns after one round that warms up."""
    outputs = [run() for run in runs]
    least = [float("inf")] * len(runs)
    for _ in range(times):
        for i, run in enumerate(runs):
            start = clock()
            run()
            least[i] = min(least[i], clock() - start)
    return list(zip(outputs, least, strict=True))
