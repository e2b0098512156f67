"""Novelty per stream."""

import numpy as np
import pytest
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


TEXTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 15)), max_size=120)


def scores(novelty: Novelty, texts: list[tuple[int, int]]) -> list[float]:
    return [novelty.read(f"stream {stream}", [BASIS[kind]])[0] for stream, kind in texts]


@given(TEXTS, TEXTS, st.integers(1, 5), st.integers(1, 10))
def test_what_is_packed_and_unpacked_scores_as_if_nothing_had_happened(
    before: list[tuple[int, int]], after: list[tuple[int, int]], streams: int, centroids: int
) -> None:
    config = NoveltyConfig(streams_max=streams, centroids_max=centroids, warmup_texts=3)
    novelty, again = Novelty(config, WIDTH, "space"), Novelty(config, WIDTH, "space")
    scores(again, after)  # which is forgotten
    scores(novelty, before)
    packed = novelty.pack()
    assert len(packed) <= novelty.packed_bytes_max
    again.unpack(packed)
    assert scores(again, after) == scores(novelty, after)


@pytest.mark.parametrize("at", [0, 8, 11, 12, 40, 200, -1])
def test_a_packed_state_with_one_wrong_bit_is_refused_and_changes_nothing(at: int) -> None:
    novelty = Novelty(NoveltyConfig(), WIDTH)
    novelty.read("s", usual(300))
    packed = bytearray(novelty.pack())
    packed[at] ^= 4
    with pytest.raises(ValueError, match="damaged"):
        novelty.unpack(bytes(packed))
    assert novelty.read("s", usual(1))[0] < 0.1


@pytest.mark.parametrize(
    ("space", "config", "width"),
    [
        ("another", NoveltyConfig(), WIDTH),
        ("space", NoveltyConfig(centroids_max=3), WIDTH),
        ("space", NoveltyConfig(), WIDTH + 1),
    ],
)
def test_a_packed_state_of_another_space_or_of_other_settings_is_refused(
    space: str, config: NoveltyConfig, width: int
) -> None:
    novelty = Novelty(NoveltyConfig(), WIDTH, "space")
    novelty.read("s", usual(10))
    with pytest.raises(ValueError, match="another model or other settings"):
        Novelty(config, width, space).unpack(novelty.pack())


def test_streams_of_any_name_are_packed_but_those_that_are_skipped_or_too_long() -> None:
    novelty = Novelty(NoveltyConfig(), WIDTH)
    for name in ("plain", "secret", "\ud800 no Unicode", "", "x" * 600):
        novelty.read(name, usual(3))
    novelty.read("nothing", [np.full(WIDTH, np.nan, np.float32)])
    again = Novelty(NoveltyConfig(), WIDTH)
    again.unpack(novelty.pack(skip={"secret"}))
    assert list(again._streams) == ["plain", "\ud800 no Unicode", ""]
