"""The cost model."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cost import (
    BATCH_S_MAX,
    REFIT_EVERY,
    SHAPES_MAX,
    CostModel,
    CostTracker,
    Sample,
    fit,
    padded,
    relative_error,
)

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
    model = fit([padded(rows, length, truth.batch_s(rows, length)) for rows, length in SHAPES])
    for rows, length in ((2, 24), (32, 96), (8, 200)):
        assert model.batch_s(rows, length) == pytest.approx(truth.batch_s(rows, length), rel=0.1)


@given(st.integers(0, 1000))
def test_no_coefficient_is_negative_whatever_the_noise(seed: int) -> None:
    chance = random.Random(seed)
    model = fit([padded(rows, length, chance.uniform(0.001, 0.1)) for rows, length in SHAPES])
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
    tracker = CostTracker([padded(rows, length, fast.batch_s(rows, length)) for rows, length in SHAPES])
    refits = 0
    for _ in range(6 * REFIT_EVERY // len(SHAPES) + 1):
        for rows, length in SHAPES:
            refits += tracker.observe(padded(rows, length, slow.batch_s(rows, length)))
    assert refits >= 3
    assert relative_error(tracker.model, [padded(8, 64, slow.batch_s(8, 64))]) < 0.1


def test_the_tracker_remembers_a_bounded_number_of_shapes() -> None:
    tracker = CostTracker()
    for rows in range(1, 200, 3):
        for length in range(1, 500, 7):
            tracker.observe(padded(rows, length, 0.01))
    assert len(tracker.samples()) == SHAPES_MAX


def test_a_single_shape_does_not_overthrow_the_model() -> None:
    tracker = CostTracker([padded(rows, length, 0.005 + 1e-4 * rows * length) for rows, length in SHAPES[:2]])
    before = tracker.model
    for _ in range(3 * REFIT_EVERY):
        tracker.observe(padded(1, 16, 9.0))
    assert tracker.model == before


def packed(chance: random.Random, truth: CostModel, texts: int) -> Sample:
    """A batch of texts of any lengths, with the time that it truly takes."""
    lengths = [chance.randint(4, 256) for _ in range(texts)]
    work = (texts, sum(lengths), sum(length * length for length in lengths))
    return Sample(*work, truth.work_s(*work))


@given(coefficients, st.integers(1, 99), st.integers(1, 999))
def test_a_batch_of_equal_lengths_costs_the_same_packed_or_padded(model: CostModel, rows: int, length: int) -> None:
    work_s = model.work_s(rows, rows * length, rows * length**2)
    assert work_s == pytest.approx(model.batch_s(rows, length))
    assert model.batch_s(rows + 1, length) - model.batch_s(rows, length) == pytest.approx(model.marginal_s(length))


@given(coefficients, st.integers(0, 1000))
def test_packed_batches_are_predicted_by_their_own_lengths(truth: CostModel, seed: int) -> None:
    chance = random.Random(seed)
    model = fit([packed(chance, truth, texts) for texts in (1, 1, 2, 3, 5, 8, 13, 21, 34, 55)])
    unseen = packed(chance, truth, 30)
    assert model.work_s(*unseen[:3]) == pytest.approx(unseen.seconds, rel=0.1)


def test_the_model_follows_packed_batches_of_which_no_two_are_alike() -> None:
    before, after = CostModel(0.005, 1e-4, 1e-8, 0), CostModel(0.005, 2e-4, 4e-8, 0)
    tracker = CostTracker([padded(rows, length, before.batch_s(rows, length)) for rows, length in SHAPES])
    chance = random.Random(7)
    for _ in range(60):
        for rows, length in SHAPES:  # the shapes measured at the start are seen again, among others
            tracker.observe(padded(rows, length, after.batch_s(rows, length)))
        for texts in (1, 3, 9, 27):
            tracker.observe(packed(chance, after, texts))
    assert len(tracker.samples()) <= SHAPES_MAX
    assert relative_error(tracker.model, [packed(chance, after, texts) for texts in (2, 10, 40)]) < 0.1
