"""Novelty per stream."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.config import NoveltyConfig
from engine.novelty import Novelty

WIDTH = 16
BASIS = np.eye(WIDTH, dtype=np.float32)


def near(vector: np.ndarray, chance: np.random.Generator, noise: float = 0.05) -> np.ndarray:  # type: ignore[type-arg]
    moved = vector + noise * chance.normal(size=WIDTH)
    return (moved / np.linalg.norm(moved)).astype(np.float16)


def usual(count: int, kinds: int = 3) -> list[np.ndarray]:  # type: ignore[type-arg]
    chance = np.random.default_rng(7)
    return [near(BASIS[i % kinds], chance) for i in range(count)]


def test_a_line_never_seen_before_stands_out_once() -> None:
    novelty = Novelty(NoveltyConfig(), WIDTH)
    before = novelty.read("s", usual(300))
    first, second = novelty.read("s", [BASIS[9], BASIS[9]])
    assert max(before[100:]) < 0.1
    assert first > 0.9
    assert second < 0.1


def test_a_new_stream_does_not_alarm_on_its_first_texts() -> None:
    scores = Novelty(NoveltyConfig(warmup_texts=50), WIDTH).read("s", list(BASIS[:10]))
    assert scores[0] == 0
    assert max(scores) <= 0.2


def test_streams_do_not_know_each_other() -> None:
    novelty = Novelty(NoveltyConfig(), WIDTH)
    novelty.read("a", usual(200))
    novelty.read("b", [near(BASIS[9], np.random.default_rng(i)) for i in range(200)])
    assert novelty.read("a", [BASIS[9]])[0] > 0.9
    assert novelty.read("b", [BASIS[9]])[0] < 0.1


def test_a_kind_that_drifts_slowly_stays_known() -> None:
    novelty = Novelty(NoveltyConfig(), WIDTH)
    angles = np.linspace(0, np.pi / 2, 2000)
    vectors = [(np.cos(a) * BASIS[0] + np.sin(a) * BASIS[1]).astype(np.float16) for a in angles]
    assert max(novelty.read("s", vectors)) < 0.2


@given(st.integers(1, 6), st.integers(1, 10), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 15)), max_size=200))
def test_state_is_bounded_and_scores_are_shares(streams: int, centroids: int, texts: list[tuple[int, int]]) -> None:
    novelty = Novelty(NoveltyConfig(streams_max=streams, centroids_max=centroids), WIDTH)
    for stream, kind in texts:
        (score,) = novelty.read(str(stream), [BASIS[kind]])
        assert 0 <= score <= 1
        assert len(novelty) <= streams
        assert len(novelty._streams[str(stream)]._centroids) <= centroids


def test_use_is_rescaled_before_it_overflows() -> None:
    novelty = Novelty(NoveltyConfig(), WIDTH)
    novelty.read("s", usual(50))
    novelty._streams["s"]._scale = 1e30
    scores = novelty.read("s", usual(50))
    assert np.isfinite(novelty._streams["s"]._uses).all()
    assert max(scores[10:]) < 0.1


def test_a_vector_that_is_no_number_is_ignored() -> None:
    novelty = Novelty(NoveltyConfig(), WIDTH)
    novelty.read("s", usual(300))
    broken, odd = novelty.read("s", [np.full(WIDTH, np.nan, np.float32), BASIS[9]])
    assert broken == 0.0
    assert odd > 0.9
