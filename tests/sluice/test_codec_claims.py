"""What an envelope that is refused for its size still claims: without that its device would send it for ever."""

import pytest

from sluice.codec import Compression, Limits, Rejected, claimed_range, decode, encode
from sluice.record import Gap, GapReason
from tests.sluice.examples import batch_of, texts

BATCH = batch_of(*texts("a", "b", "c", "d", "e" * 2000), first=100)
PAYLOAD = encode(BATCH, Compression.NONE).payload


@pytest.mark.parametrize("limits", [Limits(records_per_batch_max=4), Limits(envelope_bytes_max=1024)])
def test_a_sound_envelope_beyond_a_limit_claims_its_range(limits: Limits) -> None:
    with pytest.raises(Rejected):
        decode(PAYLOAD, limits)
    claim = claimed_range(PAYLOAD, limits, len(PAYLOAD))
    assert claim is not None
    assert (*claim.identity, claim.gaps) == (*BATCH.identity, (Gap(100, 5, GapReason.QUARANTINED),))


@pytest.mark.parametrize("end", [b"", b"\0" * 5, PAYLOAD[-5:-1] + b"\xff"])
def test_a_header_that_nothing_vouches_for_claims_nothing(end: bytes) -> None:
    """The last five bytes are the header's checksum."""
    assert claimed_range(PAYLOAD[:-5] + end, Limits(records_per_batch_max=4), len(PAYLOAD)) is None


def test_what_is_too_large_even_to_be_looked_at_claims_nothing() -> None:
    assert claimed_range(PAYLOAD, Limits(), len(PAYLOAD) - 1) is None
