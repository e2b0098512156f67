"""A record is accepted as it is or refused with the limit's name; what is stored is what the codec decodes."""

import pytest

from edge.records import (
    UNKNOWN_STREAM,
    BatchDraft,
    RecordRefused,
    StreamKey,
    declare_expired,
    frame_bytes_max,
    serialize,
)
from sluice.codec import Limits, RejectReason, decode
from sluice.errors import Permanent
from sluice.record import Gap, GapReason, Record, Sensitivity

LIMITS = Limits()
SPOOL = b"s" * 16


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (Record(0, text="x" * (64 * 1024 + 1)), RejectReason.TEXT_BYTES),
        (Record(0, text="é" * (32 * 1024 + 1)), RejectReason.TEXT_BYTES),
        (Record(0, metrics={str(n): 1.0 for n in range(257)}), RejectReason.KEYS_PER_MAP),
        (Record(0, labels={str(n): "" for n in range(257)}), RejectReason.KEYS_PER_MAP),
        (Record(0, payload=bytes(1024 * 1024)), RejectReason.ENVELOPE_BYTES),
    ],
)
def test_a_record_that_breaks_a_limit_is_refused_with_its_name(record: Record, reason: RejectReason) -> None:
    with pytest.raises(RecordRefused) as refused:
        serialize(record, LIMITS)
    assert refused.value.reason is reason


def test_a_record_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(Permanent, match="wire format"):
        serialize(Record(0, text="\ud800"), LIMITS)


def test_records_at_the_limits_pass_the_gateways_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    records = [
        Record(1, text="é" * (32 * 1024)),
        Record(2, metrics={str(n): 1.0 for n in range(256)}, labels={str(n): "v" for n in range(256)}),
        Record(3, payload=os.urandom(frame_bytes_max(LIMITS) - 64)),
    ]
    for record in records:
        draft = BatchDraft("d", "s", StreamKey("x", Sensitivity.SENSITIVE, 7), [serialize(record, LIMITS)], 1)
        batch = decode(draft.encode(SPOOL, 40), LIMITS)
        assert [Record.from_message(m) for m in batch.messages()] == [record]
        assert (batch.device_id, batch.site, batch.stream, batch.first_sequence) == ("d", "s", "x", 40)
        assert batch.sensitivity is Sensitivity.SENSITIVE


def test_a_receipt_declares_the_run_expired_under_the_stream_of_its_first_item() -> None:
    declare = declare_expired("d", "s", LIMITS)
    draft = BatchDraft("d", "s", StreamKey("x", Sensitivity.INTERNAL), [serialize(Record(1), LIMITS)], 1)
    receipt = decode(declare(SPOOL, 7, 500, draft.encode(SPOOL, 7)), LIMITS)
    assert receipt.gaps == (Gap(7, 500, GapReason.EXPIRED),)
    assert (receipt.stream, receipt.sensitivity, receipt.present_count) == ("x", Sensitivity.INTERNAL, 0)
    assert decode(declare(SPOOL, 7, 1, None), LIMITS).stream == UNKNOWN_STREAM
