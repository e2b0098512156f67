"""Whether systems compute the same vectors: who computes something else is no peer."""

from collections.abc import Sequence

import numpy as np

from benchmarks.engine.process import Pool, System, Unavailable

COSINE_MIN = 0.999
TEXTS = 64


def agreement(pool: Pool, systems: Sequence[System], reference: System, set_name: str) -> dict[str, float]:
    """Least cosine between each system's vectors and the reference's. Also warms every system up.

    A system below `COSINE_MIN` is noted as unavailable.
    """
    truth = _unit(pool.worker(reference).vectors(set_name, TEXTS, reference.options))
    least = {}
    for system in systems:
        try:
            found = _unit(pool.worker(system).vectors(set_name, TEXTS, system.options))
        except Unavailable as error:
            pool.unavailable[system.name] = str(error)
            continue
        least[system.name] = float((found * truth).sum(1).min())
        if least[system.name] < COSINE_MIN:
            pool.unavailable[system.name] = f"it computes something else: cosine {least[system.name]:.4f}"
    return least


def _unit(vectors: "np.ndarray") -> "np.ndarray":
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
