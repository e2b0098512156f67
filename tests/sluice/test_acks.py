"""The acknowledgement: what deletes must be beyond doubt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.acks import decode_ack, encode_ack
from sluice.codec import Rejected

SPOOL = bytes(range(16))
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
