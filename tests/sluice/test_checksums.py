"""What decides a record's identity, and what deletes it, is beyond doubt: no flipped bit passes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.acks import decode_ack, encode_ack
from sluice.codec import Compression, Limits, Rejected, decode, encode
from sluice.record import Gap, GapReason
from tests.sluice.examples import batch_of, texts

SPOOL = bytes(range(16))
LIMITS = Limits()
BATCH = batch_of(*texts("a", "b", "c"), first=100, gaps=(Gap(103, 2, GapReason.EXPIRED),))
RUNS = st.lists(st.tuples(st.integers(0, 2**62), st.integers(1, 1000)), max_size=5)


@given(st.integers(0, 2**62), RUNS)
def test_what_is_encoded_is_decoded(cumulative: int, runs: list[tuple[int, int]]) -> None:
    ack = decode_ack(encode_ack(SPOOL, cumulative, [(start, start + n) for start, n in runs]))
    assert (ack.spool_id, ack.cumulative_sequence) == (SPOOL, cumulative)
    assert [(r.first, r.last) for r in ack.ranges] == [(start, start + n - 1) for start, n in runs]


def test_no_flipped_bit_widens_an_acknowledgement() -> None:
    payload = encode_ack(SPOOL, 1000, [(1005, 1010), (1020, 1021)])
    sent = decode_ack(payload)
    for bit in range(8 * len(payload)):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            ack = decode_ack(bytes(damaged))
        except Rejected:
            continue
        ack.DiscardUnknownFields()
        assert ack == sent, f"bit {bit}"


def test_an_acknowledgement_without_a_checksum_is_refused() -> None:
    ack = decode_ack(encode_ack(SPOOL, 1, []))
    ack.checksum = 0
    with pytest.raises(Rejected, match="checksum"):
        decode_ack(ack.SerializeToString())


@given(st.data())
def test_no_flipped_bit_passes_as_another_batch(data: st.DataObject) -> None:
    payload = bytearray(encode(BATCH, Compression.ZSTD).payload)
    at = data.draw(st.integers(0, 8 * len(payload) - 1))
    payload[at // 8] ^= 1 << at % 8
    fate = ("identity", "record_count", "stream", "site", "sensitivity", "gaps", "data")
    try:
        batch = decode(bytes(payload), LIMITS)
    except Rejected as error:
        claimed = error.header
    else:
        claimed = None
        assert [getattr(batch, name) for name in fate] == [getattr(BATCH, name) for name in fate]
    # What a refusal claims is settled as quarantined: it must be the range that was sent.
    assert claimed is None or (claimed.identity, claimed.record_count) == (BATCH.identity, BATCH.record_count)
