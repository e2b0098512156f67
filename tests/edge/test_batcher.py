"""The batcher keeps order and limits, closes in time, and completes a chunk exactly once, with its last record."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.batcher import Batch, Batcher, BatchLimits
from edge.records import FRAME_OVERHEAD_BYTES, Chunk, StreamKey

LIMITS = BatchLimits(bytes_target=200, bytes_max=400, records_max=10, age_s_max=1.0, commit_delay_s=0.01)
KEYS = [StreamKey("a"), StreamKey("b"), StreamKey("a", priority=9)]


def chunk(key: StreamKey, *sizes: int, urgent: bool = False, time_us: int = 5) -> Chunk:
    return Chunk(key, [b"x" * size for size in sizes], time_us, cursors={"c": b"1"}, urgent=urgent)


def test_a_batch_closes_at_its_target_size() -> None:
    batcher: Batcher[int] = Batcher(LIMITS)
    assert batcher.add(chunk(KEYS[0], 80), 1, 0.0) == []
    (batch,) = batcher.add(chunk(KEYS[0], 120, time_us=3), 2, 0.5)
    assert [len(frame) for frame in batch.frames] == [80, 120]
    assert [token for _, token in batch.completed] == [1, 2]
    assert batch.oldest_time_us == 3
    assert batcher.next_deadline_s() is None


def test_a_batch_closes_one_age_after_its_first_record() -> None:
    batcher: Batcher[int] = Batcher(LIMITS)
    batcher.add(chunk(KEYS[0], 1), 1, 10.0)
    batcher.add(chunk(KEYS[0], 1), 2, 10.9)
    assert batcher.next_deadline_s() == 11.0
    assert batcher.due(10.99) == []
    assert [len(batch.frames) for batch in batcher.due(11.0)] == [2]


def test_somebody_who_waits_is_not_kept_for_the_whole_age() -> None:
    batcher: Batcher[int] = Batcher(LIMITS)
    batcher.add(chunk(KEYS[0], 1), 1, 10.0)
    batcher.add(chunk(KEYS[0], 1, urgent=True), 2, 10.2)
    batcher.add(chunk(KEYS[0], 1, urgent=True), 3, 10.205)
    assert batcher.next_deadline_s() == pytest.approx(10.21)
    (batch,) = batcher.due(10.22)
    assert [token for _, token in batch.completed] == [1, 2, 3]


def test_a_chunk_of_nothing_but_a_place_completes() -> None:
    batcher: Batcher[int] = Batcher(LIMITS)
    batcher.add(chunk(KEYS[0]), 1, 0.0)
    (batch,) = batcher.flush()
    assert (batch.frames, [token for _, token in batch.completed]) == ([], [1])


def test_a_record_beyond_the_batch_limit_travels_alone() -> None:
    batcher: Batcher[int] = Batcher(LIMITS)
    batches = batcher.add(chunk(KEYS[0], 10, 900, 10), 1, 0.0)
    assert [[len(frame) for frame in batch.frames] for batch in batches] == [[10], [900], [10]]


chunks = st.tuples(st.sampled_from(KEYS), st.lists(st.integers(0, 150), max_size=15), st.booleans(), st.floats(0, 0.6))


@given(st.lists(chunks, max_size=30))
def test_order_limits_and_deadlines_hold_for_every_sequence_of_chunks(
    steps: list[tuple[StreamKey, list[int], bool, float]],
) -> None:
    batcher: Batcher[int] = Batcher(LIMITS)
    now = 0.0
    closed: list[Batch[int]] = []
    expected: dict[StreamKey, list[bytes]] = {}
    last_record_of: dict[int, int] = {}
    arrived: dict[int, float] = {}
    for number, (key, sizes, urgent, delay) in enumerate(steps):
        now += delay
        due = batcher.due(now)
        closed += due
        frames = [f"{number}.{i}".encode().ljust(size, b".") for i, size in enumerate(sizes)]
        expected.setdefault(key, []).extend(frames)
        last_record_of[number] = len(expected[key])
        arrived[number] = now
        closed += batcher.add(Chunk(key, frames, number, urgent=urgent), number, now)
        deadline = batcher.next_deadline_s()
        assert deadline is None or deadline <= now + LIMITS.age_s_max
    closed += batcher.flush()
    assert batcher.next_deadline_s() is None
    got: dict[StreamKey, list[bytes]] = {}
    tokens = []
    for batch in closed:
        got.setdefault(batch.key, []).extend(batch.frames)
        size = sum(len(frame) + FRAME_OVERHEAD_BYTES for frame in batch.frames)
        assert size <= LIMITS.bytes_max or len(batch.frames) == 1
        assert len(batch.frames) <= LIMITS.records_max
        for _, token in batch.completed:
            # All of its records are in this batch or earlier ones.
            assert len(got[batch.key]) >= last_record_of[token]
            tokens.append(token)
    assert {key: frames for key, frames in expected.items() if frames} == {k: f for k, f in got.items() if f}
    assert sorted(tokens) == list(range(len(steps)))
