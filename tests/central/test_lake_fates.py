"""De-duplication: the first fate wins, a dropped batch leaves no trace, and forgetting is never lying."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from central.lake.fates import Fates
from sluice.intervals import IntervalSet

claims = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 30), st.integers(1, 8), st.sampled_from("csd")),
    max_size=60,
)


@given(claims, st.integers(1, 3))
def test_every_position_is_granted_once_among_the_committed_batches(steps: list, keys_max: int) -> None:
    table: dict[str, IntervalSet] = {}
    fates: Fates[str] = Fates(keys_max, 1000, lambda key: table.get(key, IntervalSet()).copy())
    granted: Counter = Counter()
    batch: list = []
    for key, start, count, then in steps:
        batch += [(key, p) for a, b in fates.claim(key, start, start + count) for p in range(a, b)]
        if then == "s":
            granted.update(batch)
            for name, position in batch:
                table.setdefault(name, IntervalSet()).add(position, position + 1)
            fates.settle()
            assert fates.keys <= keys_max
        elif then == "d":
            fates.drop()
        batch = [] if then in "sd" else batch
    assert all(count == 1 for count in granted.values())


@given(claims)
def test_what_was_dropped_can_be_claimed_again(steps: list) -> None:
    fates: Fates[str] = Fates(10, 1000, lambda key: IntervalSet())
    for key, start, count, _ in steps:
        fates.claim(key, start, start + count)
    fates.drop()
    for key, start, count, _ in steps:
        assert fates.claim(key, start, start + count) == [(start, start + count)]
        fates.drop()


def test_runs_are_bounded_by_forgetting_the_spool_that_was_touched_longest_ago() -> None:
    asked = []

    def read_back(key: str) -> IntervalSet:
        asked.append(key)
        return IntervalSet([(0, 1)])

    fates: Fates[str] = Fates(100, 5, read_back)
    for key in ("old", "young"):
        for position in range(0, 8, 2):
            fates.claim(key, position, position + 1)
        fates.settle()
    assert fates.runs <= 5
    assert fates.claim("young", 0, 1) == []
    assert asked == []
    assert fates.claim("old", 0, 1) == []
    assert asked == ["old"]


def test_what_others_committed_is_learnt() -> None:
    fates: Fates[str] = Fates(10, 1000, lambda key: IntervalSet())
    fates.learn({"a": [(0, 5)]})
    assert fates.claim("a", 3, 8) == [(5, 8)]
    fates.settle()
    fates.learn({"a": [(10, 12)]})
    assert fates.claim("a", 0, 15) == [(8, 10), (12, 15)]


def test_a_part_of_a_forgotten_spool_does_not_pass_for_the_whole() -> None:
    fates: Fates[str] = Fates(1, 1000, lambda key: IntervalSet([(0, 9)]))
    fates.learn({"a": [(0, 5)], "b": [(0, 5)]})
    fates.learn({"a": [(5, 9)]})
    assert fates.claim("a", 0, 10) == [(9, 10)]
