"""Each position of a batch is a record or lies in a gap, whatever is done to it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.errors import Permanent
from sluice.record import Gap, GapReason, Record, RecordBatch, covered, merge_gaps, validate_name
from tests.sluice.examples import batch_of, batches, reasons, records, texts


def positions(batch: RecordBatch) -> dict[int, bytes | GapReason]:
    """What is at each position; fails when one has two things or none."""
    found: dict[int, bytes | GapReason] = dict(zip(batch.sequences(), batch.frames(), strict=True))
    for gap in batch.gaps:
        for sequence in range(gap.first_sequence, gap.stop_sequence):
            assert sequence not in found
            found[sequence] = gap.reason
    assert sorted(found) == list(range(batch.first_sequence, batch.stop_sequence))
    return found


@given(records)
def test_a_record_survives_the_wire(record: Record) -> None:
    message = record.to_message()
    assert Record.from_message(type(message).FromString(message.SerializeToString())) == record


@given(batches(), st.data())
def test_without_takes_out_exactly_these_records_and_declares_them(batch: RecordBatch, data: st.DataObject) -> None:
    present = list(batch.sequences())
    gone = data.draw(st.sets(st.sampled_from(present)) if present else st.just(set()))
    reason = data.draw(reasons)
    expected = positions(batch) | dict.fromkeys(gone, reason)
    assert positions(batch.without(gone, reason)) == expected


@given(batches(), reasons)
def test_a_receipt_covers_the_same_range_and_holds_nothing(batch: RecordBatch, reason: GapReason) -> None:
    receipt = batch.receipt(reason)
    expected = {at: what if isinstance(what, GapReason) else reason for at, what in positions(batch).items()}
    assert positions(receipt) == expected
    assert (receipt.data, receipt.present_count) == (b"", 0)
    assert receipt.identity == batch.identity
    assert receipt.receipt(GapReason.DROPPED) == receipt


@given(batches())
def test_counts_agree_with_the_records(batch: RecordBatch) -> None:
    assert batch.present_count == len(batch.frames()) == len(batch.messages())
    assert covered([batch]).runs() == [(batch.first_sequence, batch.stop_sequence)]


@pytest.mark.parametrize("sequence", [9, 12])
def test_a_sequence_outside_the_batch_is_a_programmers_error(sequence: int) -> None:
    with pytest.raises(AssertionError):
        batch_of(*texts("a", "b"), first=10).without([sequence], GapReason.DROPPED)


def test_what_lies_in_a_gap_cannot_be_taken_out_again() -> None:
    batch = batch_of(*texts("a", "b"), first=10).without([10], GapReason.WITHHELD)
    with pytest.raises(Permanent, match="overlap at sequence 10"):
        batch.without([10], GapReason.DROPPED)


def test_neighbouring_gaps_of_one_reason_become_one() -> None:
    withheld, expired = GapReason.WITHHELD, GapReason.EXPIRED
    gaps = [Gap(5, 1, expired), Gap(3, 2, withheld), Gap(0, 3, withheld)]
    assert merge_gaps(gaps) == (Gap(0, 5, withheld), Gap(5, 1, expired))


@pytest.mark.parametrize(
    "record",
    [
        Record(event_time_us=2**63),
        Record(event_time_us=0, text="\ud800"),
        Record(event_time_us=0, labels={"key": "\ud800"}),
        Record(event_time_us=0, labels={"key": 1}),  # type: ignore[dict-item]
        Record(event_time_us=0, metrics={"key": "high"}),  # type: ignore[dict-item]
        Record(event_time_us="now"),  # type: ignore[arg-type]
    ],
)
def test_a_record_that_does_not_fit_the_wire_is_refused(record: Record) -> None:
    with pytest.raises(Permanent, match="wire format"):
        record.to_message()


@pytest.mark.parametrize("name", ["a", "9", "edge-01.site_2", "A" * 128])
def test_good_names(name: str) -> None:
    assert validate_name("device", name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-a", "a/b", "a+", "#", "a b", "a\n", "\n", "ä", "$SYS", "a\0", "A" * 129, "\u0661"]
)
def test_names_that_a_topic_a_key_or_a_folder_would_misread_are_refused(name: str) -> None:
    with pytest.raises(Permanent, match="not a valid name"):
        validate_name("device", name)
