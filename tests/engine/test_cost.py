"""The cost model."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cost import BATCH_S_MAX, REFIT_EVERY, SHAPES_MAX, CostModel, CostTracker, fit, relative_error

SHAPES = [(rows, length) for rows in (1, 4, 16, 64) for length in (16, 48, 128, 256)]
coefficients = st.builds(
    CostModel,
    launch_s=st.floats(1e-4, 0.1),
    token_s=st.floats(1e-6, 1e-3),
    attention_s=st.floats(0, 1e-6),
    row_s=st.floats(0, 1e-3),
)


@given(coefficients)
def test_a_fit_on_exact_times_predicts_other_shapes(truth: CostModel) -> None:
    model = fit([(rows, length, truth.batch_s(rows, length)) for rows, length in SHAPES])
    for rows, length in ((2, 24), (32, 96), (8, 200)):
        assert model.batch_s(rows, length) == pytest.approx(truth.batch_s(rows, length), rel=0.1)


@given(st.integers(0, 1000))
def test_no_coefficient_is_negative_whatever_the_noise(seed: int) -> None:
    chance = random.Random(seed)
    model = fit([(rows, length, chance.uniform(0.001, 0.1)) for rows, length in SHAPES])
    assert min(model.launch_s, model.token_s, model.attention_s, model.row_s) >= 0


def test_a_fit_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        fit([])


@given(coefficients)
def test_the_budget_makes_the_launch_cheap_unless_batches_would_last_too_long(model: CostModel) -> None:
    budget = model.budget_tokens()
    share = model.launch_s / model.batch_s(budget // 48, 48)
    lasts_s = budget * model.marginal_s(48) / 48
    assert share <= 0.06 or 2 * lasts_s > BATCH_S_MAX or budget == 32768
    assert budget == 256 or lasts_s <= BATCH_S_MAX


def test_the_model_follows_a_device_that_becomes_slower() -> None:
    fast, slow = CostModel(0.005, 1e-4, 0, 0), CostModel(0.005, 3e-4, 0, 0)
    tracker = CostTracker([(rows, length, fast.batch_s(rows, length)) for rows, length in SHAPES])
    refits = 0
    for _ in range(6 * REFIT_EVERY // len(SHAPES) + 1):
        for rows, length in SHAPES:
            refits += tracker.observe(rows, length, slow.batch_s(rows, length))
    assert refits >= 3
    assert relative_error(tracker.model, [(8, 64, slow.batch_s(8, 64))]) < 0.1


def test_the_tracker_remembers_a_bounded_number_of_shapes() -> None:
    tracker = CostTracker()
    for rows in range(1, 1000):
        tracker.observe(rows, 16, 0.01)
    assert len(tracker.samples()) == SHAPES_MAX


def test_a_single_shape_does_not_overthrow_the_model() -> None:
    tracker = CostTracker([(rows, length, 0.005 + 1e-4 * rows * length) for rows, length in SHAPES[:2]])
    before = tracker.model
    for _ in range(3 * REFIT_EVERY):
        tracker.observe(1, 16, 9.0)
    assert tracker.model == before
