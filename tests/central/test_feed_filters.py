import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from central.filters import GLOB_CHARS_MAX, GLOBS_MAX, FeedFilter, compile_globs
from protos import feed_pb2
from sluice.errors import Permanent

names = st.text("ab.-", min_size=1, max_size=5)
globs = st.text("ab.-*?[]", min_size=1, max_size=5)


def filter_of(**fields: object) -> FeedFilter:
    return FeedFilter(feed_pb2.Filter(**fields))


@given(names, st.lists(globs, max_size=4))
def test_a_name_passes_when_any_glob_matches_it_or_there_is_none(name: str, patterns: list[str]) -> None:
    expected = not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    assert filter_of(streams=patterns).passes("site", "device", name) == expected


def test_site_device_and_stream_must_all_pass() -> None:
    selection = filter_of(sites=["north*"], devices=["pi-?"], streams=["sys*", "kern"])
    assert selection.passes("north-1", "pi-3", "kern")
    assert not selection.passes("south", "pi-3", "kern")
    assert not selection.passes("north-1", "pi-33", "kern")
    assert not selection.passes("north-1", "pi-3", "host")
    assert not selection.passes("north-1", "pi-3", "KERN")


def test_results_are_chosen_by_label_and_score() -> None:
    rows = [feed_pb2.Result(label=label, score=score) for label, score in (("ok", 0.9), ("disk", 0.7), ("disk", 0.2))]
    assert filter_of(labels=["di*"], score_min=0.7).select(rows) == [rows[1]]
    assert filter_of(score_min=0.5).select(rows) == rows[:2]
    assert not filter_of(streams=["x"]).looks_into_results


def test_no_kind_means_all_kinds() -> None:
    assert filter_of().kinds == {feed_pb2.KIND_RECORDS, feed_pb2.KIND_RESULTS}
    assert filter_of(kinds=[feed_pb2.KIND_RESULTS]).kinds == {feed_pb2.KIND_RESULTS}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kinds": [0]}, "kinds"),
        ({"kinds": [77]}, "kinds"),
        ({"score_min": float("nan")}, "score_min"),
        ({"streams": ["x"] * (GLOBS_MAX + 1)}, "streams"),
        ({"labels": ["x" * (GLOB_CHARS_MAX + 1)]}, "labels"),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused_by_name(fields: dict[str, object], named: str) -> None:
    with pytest.raises(Permanent, match=f"filter.{named}"):
        filter_of(**fields)


def test_a_hostile_glob_costs_no_time() -> None:
    pattern = compile_globs("f", ["*a" * 100 + "b"])
    assert pattern is not None
    assert pattern.match("a" * 128) is None
