"""An envelope carries a batch unchanged, and a bad envelope is refused by name, cheaply, and never crashes."""

import random
from collections.abc import Callable

import google_crc32c
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from protos import record_pb2
from sluice.codec import Compression, Limits, Rejected, RejectReason, decode, decode_header, encode, header_checksum
from sluice.record import Gap, GapReason, Record, RecordBatch, Sensitivity
from tests.sluice.examples import batch_of, batches, serialised, texts

LIMITS = Limits()
BATCH = batch_of(*texts("a", "b", "c"), first=100, gaps=(Gap(103, 2, GapReason.EXPIRED),))
ONE = batch_of(*texts("a"))
Change = Callable[[record_pb2.Envelope], object]


def envelope(batch: RecordBatch = BATCH, compression: Compression = Compression.NONE) -> record_pb2.Envelope:
    return record_pb2.Envelope.FromString(encode(batch, compression).payload)


def signed(message: record_pb2.Envelope) -> bytes:
    """The envelope as a sender would send it: what it says of itself has a matching checksum."""
    message.header_checksum = header_checksum(message)
    return message.SerializeToString()


def with_body(
    body: bytes, compression: Compression | int = Compression.NONE, *, batch: RecordBatch = BATCH, **fields: object
) -> bytes:
    """A valid envelope (of BATCH) but for its records."""
    message = envelope(batch)
    message.batch, message.compression, message.checksum = (
        body,
        int(getattr(compression, "value", compression)),
        google_crc32c.value(body),
    )
    for name, value in fields.items():
        setattr(message, name, value)
    return signed(message)


def refusal(payload: bytes, limits: Limits = LIMITS) -> Rejected:
    with pytest.raises(Rejected) as caught:
        decode(payload, limits)
    return caught.value


def streamed(body: bytes, **parameters: int) -> bytes:
    """A zstd frame that does not state its size."""
    settings = zstandard.ZstdCompressionParameters.from_level(3, **parameters)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return compressor.compress(body) + compressor.flush()


@given(batches(), st.sampled_from(Compression))
def test_what_is_encoded_is_decoded(batch: RecordBatch, compression: Compression) -> None:
    sent = encode(batch, compression)
    received = decode(sent.payload, LIMITS)
    assert list(received.messages()) == list(batch.messages())
    for name in ("identity", "record_count", "stream", "site", "sensitivity", "gaps", "received_time_us"):
        assert getattr(received, name) == getattr(batch, name)
    assert (sent.device_id, sent.spool_id, sent.first_sequence) == batch.identity
    assert (sent.record_count, sent.stream) == (batch.record_count, batch.stream)


def test_compression_pays_and_a_receipt_has_no_body() -> None:
    batch = batch_of(*texts(*["the same line again"] * 100))
    assert len(encode(batch).payload) * 5 < len(encode(batch, Compression.NONE).payload)
    receipt = envelope(batch.receipt(GapReason.WITHHELD), Compression.ZSTD)
    assert (receipt.batch, receipt.compression) == (b"", record_pb2.COMPRESSION_NONE)


def test_a_frame_that_does_not_state_its_size_is_read_too() -> None:
    body = streamed(BATCH.data)
    assert decode(with_body(body, Compression.ZSTD), LIMITS).data == BATCH.data


def test_trace_context_passes_when_it_has_the_w3c_form_and_only_then() -> None:
    parent, state = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "vendor=a1"
    good = decode(encode(batch_of(*texts("x"), traceparent=parent, tracestate=state)).payload, LIMITS)
    assert (good.traceparent, good.tracestate) == (parent, state)
    for bad in (("john@example.org", state), (parent + "\n", state), ("", state)):
        batch = batch_of(*texts("x"), traceparent=bad[0], tracestate=bad[1])
        assert decode(encode(batch).payload, LIMITS).traceparent == ""
        assert decode(encode(batch).payload, LIMITS).tracestate == ""
    long = batch_of(*texts("x"), traceparent=parent, tracestate="v=" + "a" * 512)
    assert decode(encode(long).payload, LIMITS).tracestate == ""


def set_field(name: str, value: object) -> Change:
    return lambda message: setattr(message, name, value)


def gaps(*triples: tuple[int, int, int]) -> Change:
    def change(message: record_pb2.Envelope) -> None:
        del message.gaps[:]
        message.gaps.extend(record_pb2.Gap(first_sequence=a, count=n, reason=r) for a, n, r in triples)  # type: ignore[arg-type]

    return change


BAD_HEADERS: dict[str, Change] = {
    "no device": set_field("device_id", ""),
    "device with a slash": set_field("device_id", "a/b"),
    "no site": set_field("site", ""),
    "stream with a wildcard": set_field("stream", "+"),
    "short spool id": set_field("spool_id", b"123"),
    "long spool id": set_field("spool_id", bytes(17)),
    "no positions": set_field("record_count", 0),
    "sequence beyond 63 bits": set_field("first_sequence", 2**63 - 3),
    "sequence beyond 64 bits": set_field("first_sequence", 2**64 - 1),
    "gap before the range": gaps((99, 1, 1)),
    "gap behind the range": gaps((105, 1, 1)),
    "gap longer than the range": gaps((104, 2, 1)),
    "gap that wraps": gaps((2**64 - 1, 2, 1)),
    "empty gap": gaps((103, 0, 1)),
    "gaps that overlap": gaps((103, 2, 1), (104, 1, 1)),
    "gap without a reason": gaps((103, 2, 0)),
    "gap with a reason from the future": gaps((103, 2, 99)),
    "more gaps than positions": gaps(*[(103, 1, 1)] * 6),
}


@pytest.mark.parametrize("change", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_header_that_breaks_a_rule_is_refused(change: Change) -> None:
    message = envelope()
    change(message)
    error = refusal(message.SerializeToString())
    assert (error.reason, error.header) == (RejectReason.HEADER, None)


BAD_BODIES: dict[str, tuple[bytes, RejectReason]] = {
    "too few records": (with_body(serialised(*texts("a", "b"))), RejectReason.RECORD_COUNT),
    "too many records": (with_body(serialised(*texts(*"abcd"))), RejectReason.RECORD_COUNT),
    "not protobuf": (with_body(b"\xff\xff\xff"), RejectReason.UNDECODABLE),
    "records are not records": (with_body(b"\x0a\x02\xff\xff" * 3), RejectReason.UNDECODABLE),
    "text is not UTF-8": (with_body(b"\x0a\x03\x12\x01\xff" * 3), RejectReason.UNDECODABLE),
    "checksum": (with_body(BATCH.data, checksum=1), RejectReason.CHECKSUM),
    "not zstd": (with_body(b"hello", Compression.ZSTD), RejectReason.COMPRESSION),
    "zstd cut short": (
        with_body(zstandard.compress(BATCH.data)[:-1], Compression.ZSTD),
        RejectReason.COMPRESSION,
    ),
    "streamed zstd cut short": (with_body(streamed(BATCH.data)[:-3], Compression.ZSTD), RejectReason.COMPRESSION),
    "something behind the frame": (
        with_body(zstandard.compress(BATCH.data) + b"john@example.org", Compression.ZSTD),
        RejectReason.COMPRESSION,
    ),
    "something behind the streamed frame": (
        with_body(streamed(BATCH.data) + b"john@example.org", Compression.ZSTD),
        RejectReason.COMPRESSION,
    ),
    "a second frame": (with_body(zstandard.compress(BATCH.data) * 2, Compression.ZSTD), RejectReason.COMPRESSION),
    "a skippable frame": (with_body(b"\x50\x2a\x4d\x18\x04\0\0\0abcd", Compression.ZSTD), RejectReason.COMPRESSION),
    "unknown compression": (with_body(BATCH.data, compression=7), RejectReason.COMPRESSION),
    "zstd window of 128 MiB": (
        with_body(streamed(bytes(1 << 20), window_log=27), Compression.ZSTD),
        RejectReason.COMPRESSION,
    ),
    "bomb that states its size": (
        with_body(zstandard.compress(bytes(LIMITS.decompressed_bytes_max + 1)), Compression.ZSTD),
        RejectReason.DECOMPRESSED_BYTES,
    ),
    "bomb that does not": (
        with_body(streamed(bytes(LIMITS.decompressed_bytes_max + 1)), Compression.ZSTD),
        RejectReason.DECOMPRESSED_BYTES,
    ),
}


@pytest.mark.parametrize(("payload", "reason"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_bad_body_is_refused_with_the_range_that_it_claims(payload: bytes, reason: RejectReason) -> None:
    error = refusal(payload)
    assert error.reason is reason
    assert error.header is not None
    assert error.header.identity == BATCH.identity
    quarantined = Gap(100, 3, GapReason.QUARANTINED)
    assert error.header.gaps == (quarantined, Gap(103, 2, GapReason.EXPIRED))
    assert (error.header.data, str(error)) == (b"", f"{reason.value}: {error.detail}")


def test_a_frame_that_lies_about_its_size_is_refused() -> None:
    frame = bytearray(zstandard.compress(bytes(100_000)))
    honest = zstandard.get_frame_parameters(bytes(frame)).content_size
    at = bytes(frame).index(honest.to_bytes(4, "little"))
    frame[at : at + 4] = (10).to_bytes(4, "little")
    assert refusal(with_body(bytes(frame), Compression.ZSTD)).reason is RejectReason.COMPRESSION


def test_every_limit_is_named_in_its_refusal() -> None:
    many = {f"key{number}": 1.0 for number in range(9)}
    cases: dict[str, tuple[bytes, RejectReason, Limits]] = {
        "envelope_bytes_max": (bytes(2000), RejectReason.ENVELOPE_BYTES, Limits(envelope_bytes_max=1024)),
        "decompressed_bytes_max": (
            encode(batch_of(*texts("a" * 2000))).payload,
            RejectReason.DECOMPRESSED_BYTES,
            Limits(decompressed_bytes_max=1024),
        ),
        "records_per_batch_max": (encode(BATCH).payload, RejectReason.RECORD_COUNT, Limits(records_per_batch_max=4)),
        "text_bytes_max": (
            encode(batch_of(*texts("ok", "ä" * 6))).payload,
            RejectReason.TEXT_BYTES,
            Limits(text_bytes_max=11),
        ),
        "keys_per_map_max": (
            encode(batch_of(Record(0, metrics=many))).payload,
            RejectReason.KEYS_PER_MAP,
            Limits(keys_per_map_max=8),
        ),
    }
    for limit, (payload, reason, limits) in cases.items():
        error = refusal(payload, limits)
        assert (error.reason, limit in str(error)) == (reason, True), str(error)


def test_what_just_fits_a_limit_passes() -> None:
    labels = {str(number): "" for number in range(8)}
    batch = batch_of(Record(0, text="ä" * 5, labels=labels, metrics=dict.fromkeys(labels, 1.0)))
    exact = Limits(text_bytes_max=10, keys_per_map_max=8)
    assert decode(encode(batch).payload, exact).messages() == batch.messages()
    full = batch_of(*texts("a" * 1018))
    assert len(full.data) == 1024
    for compression in Compression:
        assert decode(encode(full, compression).payload, Limits(decompressed_bytes_max=1024)).data == full.data


@given(st.lists(st.sampled_from(["", "a", "b", "cc"]), max_size=12))
def test_no_arrangement_of_map_entries_slips_past_the_key_limit(keys: list[str]) -> None:
    """Short records skip the check, so a record of minimal map entries must never be short enough."""
    entries = b"".join(b"\x22" + bytes([len(k) + 2]) + b"\x0a" + bytes([len(k)]) + k.encode() for k in keys)
    body = b"\x0a" + bytes([len(entries)]) + entries
    payload = with_body(body, batch=ONE)
    limits = Limits(keys_per_map_max=2)
    if len(set(keys)) > 2:
        assert refusal(payload, limits).reason is RejectReason.KEYS_PER_MAP
    else:
        assert len(decode(payload, limits).messages()[0].labels) == len(set(keys))


def test_records_that_grow_in_canonical_form_are_measured_in_it() -> None:
    """A map entry without a value takes 5 bytes; written out in full it takes 14."""
    entries = b"".join(b"\x1a\x03\x0a\x01" + bytes([number]) for number in range(100))
    body = b"\x0a" + record_length(entries) + entries
    payload = with_body(body, batch=ONE)
    assert refusal(payload, Limits(decompressed_bytes_max=1024)).reason is RejectReason.DECOMPRESSED_BYTES
    assert len(decode(payload, LIMITS).data) > 1024 > len(body)


def record_length(body: bytes) -> bytes:
    assert len(body) < 1 << 14
    return bytes([len(body) & 0x7F | 0x80, len(body) >> 7])


CANARY = b"canary-4111"


def unknown_field(number: int, value: bytes = CANARY) -> bytes:
    """Length-delimited; the field number is below 2048."""
    tag = number << 3 | 2
    return bytes([tag & 0x7F | 0x80, tag >> 7, len(value)]) + value


def test_unknown_fields_do_not_cross() -> None:
    """What is scanned is what is sent: nothing hides in a field that a newer (or hostile) agent adds."""
    record = texts("a")[0].to_message().SerializeToString() + unknown_field(900)
    body = b"\x0a" + bytes([len(record)]) + record + unknown_field(901)
    payload = with_body(body, batch=ONE) + unknown_field(902)
    assert CANARY in payload
    received = decode(payload, LIMITS)
    assert CANARY not in received.data
    assert CANARY not in encode(received, Compression.NONE).payload
    header, _ = decode_header(payload, LIMITS)
    header.batch = b""
    assert CANARY not in header.SerializeToString()


def test_a_sensitivity_from_the_future_is_sensitive() -> None:
    message = envelope()
    message.sensitivity = 17  # type: ignore[assignment]
    assert decode(signed(message), LIMITS).sensitivity is Sensitivity.SENSITIVE


def accepted_or_rejected(payload: bytes) -> None:
    """Anything but a batch or a Rejected is a crash of the gateway."""
    try:
        batch = decode(payload, LIMITS)
    except Rejected:
        return
    assert batch.present_count == len(batch.frames())
    assert decode(encode(batch).payload, LIMITS) == batch


@given(st.binary(max_size=300))
def test_random_bytes_never_crash_the_decoder(payload: bytes) -> None:
    accepted_or_rejected(payload)


@given(batches(), st.sampled_from(Compression), st.randoms(use_true_random=False))
def test_damaged_envelopes_never_crash_the_decoder(
    batch: RecordBatch, compression: Compression, rng: random.Random
) -> None:
    accepted_or_rejected(damaged(encode(batch, compression).payload, rng))


@given(batches(), st.sampled_from(Compression), st.randoms(use_true_random=False))
def test_damaged_bodies_with_a_right_checksum_never_crash_the_decoder(
    batch: RecordBatch, compression: Compression, rng: random.Random
) -> None:
    message = envelope(batch, compression)
    message.batch = damaged(message.batch, rng)
    message.checksum = google_crc32c.value(message.batch)
    accepted_or_rejected(signed(message))


def damaged(payload: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes cut, doubled or inserted."""
    data = bytearray(payload)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + rng.randrange(1, 20)]
            case 2:
                data[at:at] = data[at : at + rng.randrange(1, 20)]
            case _:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
    return bytes(data)


BOMB = """
import resource, sys
from protos import record_pb2
from sluice.codec import Compression, Limits, Rejected, decode
from tests.sluice import test_codec
payload = {payload}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(payload) <= Limits().envelope_bytes_max, len(payload)
before = peak()
try:
    decode(payload, Limits())
except Rejected as error:
    print(error.reason.value, (peak() - before) // 1024)
"""
ALL_OF_IT = "Limits().decompressed_bytes_max"
BOMBS = {
    "a zstd frame that states 512 MiB": (
        "test_codec.with_body(test_codec.zstandard.compress(bytes(512 << 20)), Compression.ZSTD)",
        "decompressed_bytes",
    ),
    "a zstd frame of 512 MiB that states nothing": (
        "test_codec.with_body(test_codec.streamed(bytes(512 << 20)), Compression.ZSTD)",
        "decompressed_bytes",
    ),
    "4 million empty records": (
        f"test_codec.with_body(test_codec.zstandard.compress(b'\\x0a\\0' * ({ALL_OF_IT} // 2)), Compression.ZSTD)",
        "record_count",
    ),
    "500,000 empty gaps": ("test_codec.envelope().SerializeToString() + b'\\x5a\\0' * 500_000", "header"),
    "500,000 empty map entries of the envelope's unknown fields": (
        "b'\\xaa\\x06\\0' * 340_000",
        "header",
    ),
}


@pytest.mark.parametrize(("payload", "reason"), BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_without_the_memory_that_it_asks_for(
    payload: str, reason: str, python: Callable[[str], str]
) -> None:
    """Peak resident memory of a fresh process, in MiB, beyond what it took to build the bomb."""
    built_in_another_process = f"bytes.fromhex({python(PRINT.format(payload=payload)).strip()!r})"
    result, mib = python(BOMB.format(payload=built_in_another_process)).split()
    assert result == reason
    assert int(mib) < 140


PRINT = """
from sluice.codec import Compression, Limits
from tests.sluice import test_codec
print(({payload}).hex())
"""
