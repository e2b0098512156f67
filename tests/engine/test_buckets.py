"""Length buckets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.buckets import Ladder, reporting_class
from engine.config import LADDER, REPORTING_CLASSES


@given(st.integers(1, 600), st.integers(1, 512))
def test_a_text_is_padded_to_the_next_edge_and_no_further(tokens: int, length_max: int) -> None:
    ladder = Ladder(LADDER, length_max)
    if tokens > length_max:
        with pytest.raises(ValueError, match="exceed the longest bucket"):
            ladder.edge(tokens)
        return
    edge = ladder.edge(tokens)
    assert tokens <= edge <= length_max
    assert not [other for other in ladder.edges if tokens <= other < edge]


@given(st.integers(8, 512))
def test_the_fine_ladder_pads_a_text_by_less_than_half(tokens: int) -> None:
    assert Ladder(LADDER, 512).edge(tokens) / tokens < 1.5


@given(st.integers(1, 10_000))
def test_every_batch_is_reported_under_one_classic_class(length: int) -> None:
    found = reporting_class(length, REPORTING_CLASSES)
    assert found in REPORTING_CLASSES
    assert length <= found or found == REPORTING_CLASSES[-1]
