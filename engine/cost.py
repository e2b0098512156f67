"""What a batch costs: t = c0 + c1*tokens + c2*squares + c3*rows, in seconds. Pure.

c0 is the price of a launch, c1 of a token through the linear layers, c2 of attention (squares is the sum of the
rows' lengths squared), c3 of a row (pooling, result). In a padded batch every row counts with the padded length,
in a packed one with its own. The coefficients are fitted by non-negative least squares on relative errors, so
that small batches weigh as much as large ones, and refitted while running from a bounded memory of what batches
really took.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from math import log2
from typing import Final, NamedTuple

SHAPES_MAX: Final = 128
REFIT_EVERY: Final = 64
# Shapes per doubling of rows, length and unevenness.
_STEPS: Final = 4
# A new observation's weight: a shape's time follows a change of load within about ten batches.
SMOOTHING: Final = 0.2
# Where the price of a token is read off, in tokens: the middle of what logs hold.
TYPICAL_LENGTH: Final = 48
# The longest batch that a budget is chosen for: what an online text may have to wait for.
BATCH_S_MAX: Final = 0.25


@dataclass(frozen=True, slots=True)
class CostModel:
    """Fitted coefficients, in seconds.

    Attributes:
        launch_s: per batch.
        token_s: per computed token.
        attention_s: per computed token and token attended to.
        row_s: per row.
    """

    launch_s: float
    token_s: float
    attention_s: float
    row_s: float

    def batch_s(self, rows: int, length: int) -> float:
        """Seconds for `rows` texts padded to `length` tokens."""
        return self.launch_s + rows * self.marginal_s(length)

    def work_s(self, rows: int, tokens: int, squares: int) -> float:
        """Seconds for `rows` texts of `tokens` computed tokens, whose lengths squared sum up to `squares`."""
        return self.launch_s + tokens * self.token_s + squares * self.attention_s + rows * self.row_s

    def marginal_s(self, length: int) -> float:
        """Seconds that one more row of `length` tokens adds."""
        return length * (self.token_s + self.attention_s * length) + self.row_s

    @property
    def typical_token_s(self) -> float:
        """Seconds per token in a large batch of texts of typical length."""
        return max(self.marginal_s(TYPICAL_LENGTH) / TYPICAL_LENGTH, 1e-12)

    def budget_tokens(self, efficiency: float = 0.95, least: int = 256, most: int = 32768) -> int:
        """Tokens per batch, a power of two, at which the launch costs at most `1 - efficiency` of the time.

        Smaller when such a batch lasts longer than an online text should have to wait for it.
        """
        per_token_s = self.typical_token_s
        wanted = self.launch_s / per_token_s * efficiency / (1 - efficiency)
        budget = least
        while budget < min(wanted, most) and 2 * budget * per_token_s <= BATCH_S_MAX:
            budget *= 2
        return budget


# Before anything is measured: one CPU core or so, from a fit of MiniLM on two cores.
PRIOR: Final = CostModel(launch_s=0.005, token_s=0.00013, attention_s=0.0, row_s=0.0)


class Sample(NamedTuple):
    """A measured batch."""

    rows: int
    tokens: int
    squares: int
    seconds: float


def padded(rows: int, length: int, seconds: float) -> Sample:
    """A measured batch of rows padded to `length` tokens."""
    return Sample(rows, rows * length, rows * length * length, seconds)


def fit(samples: Iterable[Sample]) -> CostModel:
    """Fits the model; at least two samples of different sizes make a useful one.

    Non-negative least squares by trying every set of active terms: with four terms that is 15 tiny solves,
    exact, and needs no SciPy.

    Raises:
        ValueError: when there is no sample.
    """
    import numpy as np

    data = [sample for sample in samples if sample[3] > 0]
    if not data:
        raise ValueError("no samples to fit a cost model on")
    rows, tokens, squares, seconds = (np.array(column, float) for column in zip(*data, strict=True))
    terms = np.stack([np.ones_like(rows), tokens, squares, rows], axis=1) / seconds[:, None]
    best, best_error = np.zeros(4), float("inf")
    for size in range(1, 5):
        for active in combinations(range(4), size):
            solution, *_ = np.linalg.lstsq(terms[:, active], np.ones_like(rows), rcond=None)
            error = float(((terms[:, active] @ solution - 1) ** 2).sum())
            # A larger set must earn its place: a perfect fit of noise by one more term is no information.
            if (solution >= 0).all() and error < best_error * 0.999:
                best, best_error = np.zeros(4), error
                best[list(active)] = solution
    return CostModel(*(float(value) for value in best))


def relative_error(model: CostModel, samples: Iterable[Sample]) -> float:
    """Mean of |predicted - measured| / measured."""
    errors = [abs(model.work_s(*work) - seconds) / seconds for *work, seconds in samples]
    return sum(errors) / len(errors) if errors else 0.0


class CostTracker:
    """A cost model that follows what batches really take.

    Batches are remembered by shape: rows, mean length and unevenness of lengths, each rounded to a step of about a
    fifth, so that packed batches, of which no two are alike, share shapes too.

    Args:
        samples: of the start-up measurement.
    """

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        self._shapes: OrderedDict[tuple[int, int, int], Sample] = OrderedDict()
        self._since_fit = 0
        for sample in samples:
            self._shapes[_shape(sample)] = sample
        self.model = fit(self.samples()) if self._shapes else PRIOR

    def samples(self) -> list[Sample]:
        """What is known now, one sample per shape."""
        return list(self._shapes.values())

    def observe(self, sample: Sample) -> bool:
        """Takes in one batch. Returns True when the model was refitted."""
        if sample.seconds <= 0:
            return False
        shape = _shape(sample)
        known = self._shapes.get(shape)
        # The measured time is carried over to the newest batch of that shape by what the model says of both.
        if known is not None:
            expected_s = self.model.work_s(*sample[:3])
            before_s = known.seconds / max(self.model.work_s(*known[:3]), 1e-12) * expected_s
            sample = sample._replace(seconds=before_s + SMOOTHING * (sample.seconds - before_s))
        self._shapes[shape] = sample
        self._shapes.move_to_end(shape)
        if len(self._shapes) > SHAPES_MAX:
            self._shapes.popitem(last=False)
        self._since_fit += 1
        if self._since_fit < REFIT_EVERY:
            return False
        self._since_fit = 0
        # One shape repeated says nothing about the others: keep the old model until there is variety.
        if len({length for _, length, _ in self._shapes}) >= 3 and len(self._shapes) >= 6:
            self.model = fit(self.samples())
            return True
        return False


def _shape(sample: Sample) -> tuple[int, int, int]:
    length = sample.tokens / sample.rows
    unevenness = sample.squares / (sample.tokens * length)
    return tuple(round(_STEPS * log2(max(1.0, value))) for value in (sample.rows, length, unevenness))  # type: ignore[return-value] # three values
