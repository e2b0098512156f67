"""What is read from the model's output."""

from typing import Any

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


def test_scores_are_about_as_high_as_labels_are_right() -> None:
    """On texts that calibration has not seen, of clear labels and of mixed ones, against temperatures for all."""
    misses: dict[str, list[float]] = {"calibrated": [], "default": [], "none": []}
    for noise in (1.5, 3.0, 4.0):
        for seed in range(3):
            chance = np.random.default_rng(seed)
            centres = chance.normal(size=(4, 32))

            def draw(each: int, noise: float = noise, chance: Any = chance, centres: Any = centres) -> Any:
                points = np.repeat(centres, each, 0) + noise * chance.normal(size=(4 * each, 32))
                return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)

            subject = ZeroShotClassifier(list("abcd"), np.repeat(range(4), 8).tolist(), draw(8))
            texts = list(draw(50))
            for name, temperature in (
                ("calibrated", subject.temperature),
                ("default", TEMPERATURE_DEFAULT),
                ("none", 1.0),
            ):
                subject.temperature = temperature
                verdicts = subject.read(texts)
                right = np.mean([verdict.label == "abcd"[i // 50] for i, verdict in enumerate(verdicts)])
                misses[name].append(abs(float(np.mean([verdict.score for verdict in verdicts]) - right)))
    calibrated, *others = (np.mean(each) for each in misses.values())
    assert calibrated < 0.08
    assert all(calibrated < other / 1.5 for other in others)


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


@pytest.mark.parametrize(
    ("problem", "labels", "wanted"),
    [
        ("", "x", [0.7310586, 1.0, 0.0]),
        ("multi_label_classification", "xy", [0.7310586, 1.0, 0.5]),
        ("single_label_classification", "xy", [0.7310586, 1.0, 1.0]),
        ("regression", "x", [1.0, 500.0, -500.0]),
    ],
)
def test_a_head_is_read_as_its_problem_asks(problem: str, labels: str, wanted: list[float]) -> None:
    rows = [np.array([9.0, *each][: 1 + len(labels)], np.float32) for each in ((1.0, 0.0), (500.0, 0.0), (-500.0, 0.0))]
    verdicts = HeadClassifier(list(labels), 1, problem).read(rows)
    assert [verdict.score for verdict in verdicts] == pytest.approx(wanted)


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
