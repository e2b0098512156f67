"""An interval set is a set of integers, stored as runs."""

from hypothesis import given
from hypothesis import strategies as st

from sluice.intervals import IntervalSet, runs_of

bounds = st.tuples(st.integers(0, 40), st.integers(0, 40))
changes = st.lists(st.tuples(st.sampled_from(["add", "remove"]), bounds), max_size=25)


def apply(steps: list[tuple[str, tuple[int, int]]]) -> tuple[IntervalSet, set[int]]:
    """The same steps on an interval set and on a plain set; what each step reports is compared on the way."""
    runs, model = IntervalSet(), set()
    for change, (start, stop) in steps:
        span = set(range(start, stop))
        if change == "add":
            assert runs.add(start, stop) == len(span - model)
            model |= span
        else:
            assert runs.remove(start, stop) == len(span & model)
            model -= span
    return runs, model


def members(runs: list[tuple[int, int]]) -> set[int]:
    return {value for start, stop in runs for value in range(start, stop)}


@given(changes)
def test_it_holds_what_a_set_would_hold(steps: list[tuple[str, tuple[int, int]]]) -> None:
    runs, model = apply(steps)
    assert members(runs.runs()) == model
    assert len(runs) == len(model)
    assert bool(runs) == bool(model)
    assert all((value in runs) == (value in model) for value in range(-1, 42))


@given(changes)
def test_its_runs_are_sorted_disjoint_and_never_touch(steps: list[tuple[str, tuple[int, int]]]) -> None:
    runs, _ = apply(steps)
    flat = [bound for run in runs.runs() for bound in run]
    assert flat == sorted(set(flat))
    assert runs.run_count == len(runs.runs())


@given(changes, bounds)
def test_questions_about_a_range_are_answered_as_by_a_set(
    steps: list[tuple[str, tuple[int, int]]], span: tuple[int, int]
) -> None:
    runs, model = apply(steps)
    asked = set(range(*span))
    there, gone = list(runs.intersection(*span)), list(runs.missing(*span))
    assert members(there) == asked & model
    assert members(gone) == asked - model
    assert all(start < stop for start, stop in there + gone)
    assert runs.covers(*span) == (asked <= model)


@given(changes)
def test_a_copy_is_independent(steps: list[tuple[str, tuple[int, int]]]) -> None:
    runs, model = apply(steps)
    copy = runs.copy()
    assert copy == runs
    copy.add(100, 101)
    assert members(runs.runs()) == model
    assert copy != runs


@given(st.sets(st.integers(0, 60)))
def test_sorted_integers_fold_into_runs(values: set[int]) -> None:
    assert list(runs_of(sorted(values))) == IntervalSet((value, value + 1) for value in values).runs()


def test_a_million_neighbours_are_one_run() -> None:
    runs = IntervalSet((start, start + 1000) for start in range(0, 1_000_000, 1000))
    assert (len(runs), runs.run_count) == (1_000_000, 1)


def test_it_reaches_the_end_of_the_sequence_space() -> None:
    runs = IntervalSet([(2**63 - 10, 2**63 - 1)])
    assert runs.covers(2**63 - 10, 2**63 - 1)
    assert 2**63 - 1 not in runs
    assert "x" not in runs
