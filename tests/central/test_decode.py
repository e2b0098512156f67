"""Decoding: the fast path equals the loop on whatever the wire may carry, and one bad message fails alone."""

from collections.abc import Sequence

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from central.decode import RECORD_TYPE, Bad, EnvelopeDecoder, Good, LoopDecoder, PtarsDecoder
from protos import record_pb2
from sluice.codec import Limits, encode
from sluice.record import GapReason, Record, RecordBatch, join_frames
from tests.central.lake_support import SPOOL, damaged, envelope, message

INT64 = st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63), 1_790_000_000_000_000])
WORDS = st.one_of(
    st.just(""), st.text(max_size=20), st.sampled_from(["\x00", "\U0001d518nicode", "e\u0301", "\u202e", "a" * 3000])
)
DOUBLES = st.floats(allow_nan=True, allow_infinity=True)
RECORDS = st.builds(
    record_pb2.Record,
    event_time_us=INT64,
    text=WORDS,
    metrics=st.dictionaries(WORDS, DOUBLES, max_size=4),
    labels=st.dictionaries(WORDS, WORDS, max_size=4),
    payload=st.binary(max_size=50),
    content_type=WORDS,
)
FAST, LOOP = PtarsDecoder(), LoopDecoder()


def canonical(batch: Sequence[record_pb2.Record]) -> bytes:
    return record_pb2.RecordBatch(records=batch).SerializeToString()


def comparable(rows: pa.StructArray) -> list[dict]:
    """Rows as values: maps without their order (which upb does not promise), NaN as a word."""
    found = []
    for row in rows.to_pylist():
        metrics = {key: repr(value) for key, value in row["metrics"]}
        assert len(metrics) == len(row["metrics"]), "a key twice"
        found.append(row | {"metrics": metrics, "labels": dict(row["labels"])})
    return found


@given(st.lists(st.lists(RECORDS, max_size=4), max_size=4))
def test_the_fast_path_equals_the_loop(batches: list[list[record_pb2.Record]]) -> None:
    bodies = [canonical(batch) for batch in batches]
    fast, loop = FAST.decode(bodies) if bodies else [], LOOP.decode(bodies)
    assert [rows.type for rows in (*fast, *loop)] == [RECORD_TYPE] * len(bodies) * 2
    assert [comparable(rows) for rows in fast] == [comparable(rows) for rows in loop]


def map_entry_twice() -> bytes:
    """A record with the label `k` twice on the wire, the last one being the one that counts."""

    def entry(value: bytes) -> bytes:
        body = b"\x0a\x01k\x12" + bytes([len(value)]) + value
        return b"\x22" + bytes([len(body)]) + body

    return entry(b"first") + entry(b"last")


def with_unknown_field() -> bytes:
    return record_pb2.Record(text="known").SerializeToString() + b"\x7a\x06canary"


def wire(*frames: bytes) -> bytes:
    return wire_at(0, *frames)


@pytest.mark.parametrize("fast", [FAST, LOOP], ids=["ptars", "loop"])
def test_duplicate_map_keys_and_unknown_fields_do_not_reach_the_lake(fast: PtarsDecoder | LoopDecoder) -> None:
    outcome = EnvelopeDecoder(Limits(), fast=fast).decode([message(0, wire(map_entry_twice(), with_unknown_field()))])
    assert isinstance(outcome[0], Good)
    rows = comparable(outcome[0].rows)
    assert [row["labels"] for row in rows] == [{"k": "last"}, {}]
    assert [row["text"] for row in rows] == ["", "known"]


def test_empty_records_and_receipts_are_decoded() -> None:
    outcomes = EnvelopeDecoder(Limits()).decode(
        [message(0, wire(b"", b"")), message(1, envelope(5, 0, gaps=[(5, 3, GapReason.WITHHELD)]))]
    )
    assert [len(outcome.rows) for outcome in outcomes if isinstance(outcome, Good)] == [2, 0]


def test_a_bad_message_fails_alone_and_says_why() -> None:
    values = [envelope(0, 3), b"junk", envelope(3, 2), damaged(5, 4), b"", envelope(9, 1)]
    outcomes = EnvelopeDecoder(Limits()).decode([message(i, value) for i, value in enumerate(values)])
    assert [type(outcome) for outcome in outcomes] == [Good, Bad, Good, Bad, Bad, Good]
    bad = outcomes[3]
    assert isinstance(bad, Bad)
    assert bad.reason == "checksum"
    assert bad.header is not None
    assert [(gap.first_sequence, gap.count, gap.reason) for gap in bad.header.gaps] == [(5, 4, GapReason.QUARANTINED)]


class RefusesWord(PtarsDecoder):
    """Fails on every call that contains a certain word, as a bug in a decoder would."""

    def __init__(self, word: bytes) -> None:
        super().__init__()
        self.word = word
        self.calls = 0

    def decode(self, bodies: Sequence[bytes]) -> list[pa.StructArray]:
        self.calls += 1
        if any(self.word in body for body in bodies):
            raise ValueError("refused")
        return super().decode(bodies)


def numbered(number: int) -> bytes:
    return wire_at(number, Record(1, text=f"<{number}>").to_message().SerializeToString())


def wire_at(first: int, *frames: bytes) -> bytes:
    return encode(RecordBatch("device-1", SPOOL, first, len(frames), "logs", "site-1", join_frames(frames))).payload


NUMBERED = [message(number, numbered(number)) for number in range(16)]


class TestWhatTheFastPathRefuses:
    def test_is_isolated_by_halving_and_tried_with_the_loop(self) -> None:
        fast = RefusesWord(b"<11>")
        outcomes = EnvelopeDecoder(Limits(), fast=fast).decode(NUMBERED)
        assert [o.rows.field("text")[0].as_py() for o in outcomes if isinstance(o, Good)] == [
            f"<{i}>" for i in range(16)
        ]
        assert fast.calls <= 2 * 4 + 1

    def test_is_quarantined_when_the_loop_refuses_it_too(self) -> None:
        decoder = EnvelopeDecoder(Limits(), fast=RefusesWord(b"<11>"), fallback=RefusesWord(b"<11>"))
        outcomes = decoder.decode(NUMBERED)
        assert [i for i, o in enumerate(outcomes) if isinstance(o, Bad)] == [11]
        bad = outcomes[11]
        assert isinstance(bad, Bad)
        assert bad.header is not None
        assert [(gap.first_sequence, gap.count) for gap in bad.header.gaps] == [(11, 1)]


def test_bodies_that_upb_refuses_are_refused_by_ptars_too() -> None:
    for body in (b"\x0a\x05\x12\x03\xff\xfe\xfd", b"\xff", b"\x0a\x7f"):
        with pytest.raises(ValueError, match="ptars"):
            FAST.decode([body])
