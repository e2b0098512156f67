"""The router's promises: every position has one fate, and what is in doubt stays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.batches import Decision, Verdict
from gateway.router import IN_DOUBT, route
from sluice.record import Gap, GapReason, RecordBatch, Route
from tests.sluice.examples import batch_of, batches, texts

decisions = st.builds(Decision, st.sampled_from(Route), st.just("rule"))


@given(batches(), st.data())
def test_each_record_leaves_or_stays_or_is_declared_dropped(batch: RecordBatch, data: st.DataObject) -> None:
    default = data.draw(decisions)
    count = batch.present_count
    indices = st.integers(0, count - 1) if count else st.nothing()
    verdict = Verdict(default, data.draw(st.dictionaries(indices, decisions, max_size=count)))
    parts = route(batch, verdict)
    out = parts.export.to_record_batch()
    assert (out.first_sequence, out.stop_sequence) == (batch.first_sequence, batch.stop_sequence)
    exported = dict(zip(out.sequences(), out.frames(), strict=True))
    local = parts.local
    stayed = dict(zip(local.sequences, local.frames, strict=True)) if local else {}
    declared = {s: gap.reason for gap in out.gaps for s in range(gap.first_sequence, gap.stop_sequence)}
    for index, (sequence, frame) in enumerate(zip(batch.sequences(), batch.frames(), strict=True)):
        wanted = verdict.at(index).route
        if wanted is Route.CLOUD:
            assert exported.pop(sequence) == frame
            assert sequence not in declared
        elif wanted is Route.DROP:
            assert declared[sequence] is GapReason.DROPPED
        else:
            assert stayed.pop(sequence) == frame
            assert declared[sequence] is GapReason.WITHHELD
    assert not exported
    assert not stayed


@pytest.mark.parametrize("index", [-1, 2, 7])
def test_a_verdict_that_does_not_fit_its_batch_keeps_all_of_it(index: int) -> None:
    cloud = Decision(Route.CLOUD, "rule")
    parts = route(batch_of(*texts("a", "b")), Verdict(cloud, {index: cloud}))
    assert parts.local is not None
    assert parts.local.sequences == (0, 1)
    assert parts.export.data == b""


def test_doubt_keeps_all_and_still_sends_the_receipt() -> None:
    batch = batch_of(*texts("a", "b"), gaps=(Gap(2, 1, GapReason.EXPIRED),))
    parts = route(batch, IN_DOUBT)
    assert parts.local is not None
    assert parts.local.frames == tuple(batch.frames())
    assert parts.export.gaps == (Gap(0, 2, GapReason.WITHHELD), Gap(2, 1, GapReason.EXPIRED))


def test_a_batch_of_gaps_passes_as_it_is() -> None:
    batch = batch_of(gaps=(Gap(0, 5, GapReason.EXPIRED),))
    parts = route(batch, IN_DOUBT)
    assert parts.local is None
    assert parts.export.gaps == batch.gaps
