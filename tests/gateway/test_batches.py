"""What leaves and what stays is decided by type, and declared by position."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.batches import Decision, ExportBatch, LocalBatch, Verdict
from sluice import codec
from sluice.codec import Limits
from sluice.record import Gap, GapReason, RecordBatch, Route
from tests.sluice.examples import batch_of, batches, texts

LOCAL = Decision(Route.LOCAL, "rule", ("email",))
CLOUD = Decision(Route.CLOUD, "rule")


@given(batches(), st.data())
def test_an_export_covers_the_whole_range_and_holds_only_what_was_not_withheld(
    batch: RecordBatch, data: st.DataObject
) -> None:
    present = dict(zip(batch.sequences(), batch.frames(), strict=True))
    fates = {s: data.draw(st.sampled_from([None, GapReason.WITHHELD, GapReason.DROPPED])) for s in present}
    withheld = {r: [s for s, f in fates.items() if f is r] for r in (GapReason.WITHHELD, GapReason.DROPPED)}
    out = ExportBatch.of(batch, withheld).to_record_batch()
    assert (out.first_sequence, out.record_count) == (batch.first_sequence, batch.record_count)
    assert dict(zip(out.sequences(), out.frames(), strict=True)) == {s: present[s] for s, f in fates.items() if not f}
    declared = {s: gap.reason for gap in out.gaps for s in range(gap.first_sequence, gap.stop_sequence)}
    kept = {s: gap.reason for gap in batch.gaps for s in range(gap.first_sequence, gap.stop_sequence)}
    assert declared == kept | {s: f for s, f in fates.items() if f}


@given(batches())
def test_a_receipt_holds_no_record_and_closes_the_range(batch: RecordBatch) -> None:
    receipt = ExportBatch.receipt(batch, GapReason.QUARANTINED).to_record_batch()
    assert receipt.data == b""
    assert receipt.present_count == 0
    assert receipt.identity == batch.identity
    assert codec.decode(codec.encode(receipt).payload, Limits()).gaps == receipt.gaps


@given(batches(), st.data())
def test_a_local_batch_holds_exactly_the_records_that_stay(batch: RecordBatch, data: st.DataObject) -> None:
    stay = {i for i in range(batch.present_count) if data.draw(st.booleans())}
    local = LocalBatch.of(batch, Verdict(CLOUD, dict.fromkeys(stay, LOCAL)))
    rows = list(zip(batch.sequences(), batch.frames(), strict=True))
    expected = [row for i, row in enumerate(rows) if i in stay]
    if not expected:
        assert local is None
        return
    assert local is not None
    assert list(zip(local.sequences, local.frames, strict=True)) == expected
    assert set(local.why) == {LOCAL}
    assert local.size_bytes == sum(len(frame) for _, frame in expected)


def test_free_text_of_the_trace_context_does_not_leave() -> None:
    canary = "4111111111111111"
    batch = batch_of(*texts("a"), traceparent=canary, tracestate=f"vendor={canary}")
    assert canary.encode() not in codec.encode(ExportBatch.of(batch, {}).to_record_batch()).payload
    traced = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    assert ExportBatch.of(batch_of(*texts("a"), traceparent=traced), {}).traceparent == traced


def test_gaps_of_the_device_are_kept_beside_ours() -> None:
    batch = batch_of(*texts("a", "b"), gaps=(Gap(2, 3, GapReason.EXPIRED),))
    out = ExportBatch.of(batch, {GapReason.WITHHELD: [1]})
    assert out.gaps == (Gap(1, 1, GapReason.WITHHELD), Gap(2, 3, GapReason.EXPIRED))
