"""What is read from the model's output."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.backend import BackendInfo
from engine.tasks import (
    TEMPERATURE_DEFAULT,
    TEMPERATURES,
    HeadClassifier,
    ZeroShotClassifier,
    build,
    calibrate,
    find,
)
from sluice.errors import Permanent


def unit(*values: float) -> np.ndarray:  # type: ignore[type-arg]
    vector = np.array(values, np.float32)
    return vector / np.linalg.norm(vector)


def test_zero_shot_takes_the_label_with_the_nearest_description() -> None:
    vectors = np.stack([unit(1, 0, 0), unit(0, 1, 0), unit(0, 0, 1)])
    subject = ZeroShotClassifier(["a", "b"], [0, 0, 1], vectors)
    verdicts = subject.read([unit(0, 1, 0.2).astype(np.float16), unit(0.1, 0, 1).astype(np.float16)])
    assert [verdict.label for verdict in verdicts] == ["a", "b"]
    assert all(0.5 < verdict.score <= 1 for verdict in verdicts)
    assert subject.read([]) == []


def test_a_text_between_two_labels_gets_a_score_that_says_so() -> None:
    vectors = np.stack([unit(1, 0), unit(0, 1)])
    verdict = ZeroShotClassifier(["a", "b"], [0, 1], vectors).read([unit(1, 1.0001)])[0]
    assert verdict.score == pytest.approx(0.5, abs=0.01)


def test_clear_labels_get_a_lower_temperature_than_mixed_ones() -> None:
    chance = np.random.default_rng(7)
    owner = [label for label in range(3) for _ in range(6)]
    centres = chance.normal(size=(3, 16))

    def temperature(noise: float) -> float:
        vectors = np.stack([unit(*(centres[label] + noise * chance.normal(size=16))) for label in owner])
        return calibrate(vectors @ vectors.T, owner, 3)

    assert temperature(0.1) == TEMPERATURES[0]
    assert temperature(3.0) > 5 * TEMPERATURES[0]


def test_one_description_a_label_leaves_the_default_temperature() -> None:
    assert calibrate(np.eye(3, dtype=np.float32), [0, 1, 2], 3) == TEMPERATURE_DEFAULT


@given(st.lists(st.lists(st.floats(-30, 30), min_size=3, max_size=3), min_size=1, max_size=5))
def test_a_head_gives_the_softmax_of_its_logits(logits: list[list[float]]) -> None:
    rows = [np.array([9.0, 9.0, *each], np.float32) for each in logits]
    for verdict, each in zip(HeadClassifier(["x", "y", "z"], 2).read(rows), logits, strict=True):
        shares = np.exp(np.array(each) - max(each))
        shares /= shares.sum()
        assert verdict.score == pytest.approx(shares.max(), abs=1e-5)
        assert shares["xyz".index(verdict.label)] == pytest.approx(shares.max(), abs=1e-5)


def test_tasks_follow_from_the_model_and_a_missing_one_is_named() -> None:
    def embed(texts: object) -> np.ndarray:  # type: ignore[type-arg]
        return np.eye(4, dtype=np.float32)

    labels = {"a": ("1", "2"), "b": ("3", "4")}
    plain = build(BackendInfo("cpu", "fp32", 1, True, 64, 4), labels, embed)
    head = build(BackendInfo("cpu", "fp32", 1, True, 64, 4, ("x", "y")), labels, embed)
    assert isinstance(plain["classify"], ZeroShotClassifier)
    assert isinstance(head["classify"], HeadClassifier)
    with pytest.raises(Permanent, match=r"task 'tokens' is not available with model 'm'.*classify, embed, novelty"):
        find(plain, "tokens", "m")
