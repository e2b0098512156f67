"""The envelope on the wire: what agent, gateway, Kafka and lake exchange (`protos/record.proto`).

Encoding: `RecordBatch.data` -> zstd -> crc32c -> `Envelope`.

Decoding faces the network, so every step has a limit and is ordered from cheap to dear: size of the envelope, header,
checksum of the compressed bytes, bounded decompression, number of records (counted by C as byte strings, 16 bytes each,
before any record is materialised), then the records. Known attacks and their guards:
  * a zstd frame that states a huge size: `decompress(max_output_size=...)` ignores the limit there, so the stated size
    is checked first, and a frame that states none is read by the stream reader to one byte past the limit, with a
    bounded window;
  * a frame that is cut short, or has something behind it: the stream reader says nothing of either;
  * a megabyte of empty sub-messages (28 times its size after parsing): counted as frames first;
  * unknown fields, which survive parse and serialise: discarded, so that what is scanned is what is sent;
  * sparse map entries, which grow when serialised in full: the canonical form must fit the limit too;
  * trace context, free text beside the records that nobody scans: dropped unless it has W3C's form.

A refusal is a `Rejected` that names its reason and, when the header could be read, the identity it claims.
"""

import re
import struct
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Final, TypeVar

import google_crc32c
import zstandard
from google.protobuf.message import DecodeError, Message
from msgspec import Meta
from msgspec.structs import replace

from protos import record_pb2
from sluice.config import Section
from sluice.errors import Permanent
from sluice.record import (
    SEQUENCE_MAX,
    SPOOL_ID_BYTES,
    Gap,
    GapReason,
    RecordBatch,
    Sensitivity,
    merge_gaps,
    validate_name,
)

KIB: Final = 1024
MIB: Final = 1024 * KIB
# A map entry with a distinct non-empty key takes at least 5 bytes: tag, length, key tag, key length, one character.
_MAP_ENTRY_BYTES_MIN: Final = 5
# W3C Trace Context, 3.2 and 3.3: version-trace-parent-flags; and a list of key=value of at most 512 characters.
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}\Z")
_TRACESTATE: Final = re.compile(r"[a-z0-9][a-z0-9_*/@-]{0,240}=[\x20-\x7e]{1,512}\Z")
_TRACESTATE_CHARS_MAX: Final = 512
_U32: Final = 0xFFFFFFFF
_M = TypeVar("_M", bound=Message)


class Limits(Section, frozen=True, kw_only=True):
    """Limits of one envelope. Whatever exceeds one is quarantined with the limit's name as the reason."""

    envelope_bytes_max: Annotated[int, Meta(ge=KIB, description="Size of one envelope on the wire.")] = MIB
    decompressed_bytes_max: Annotated[int, Meta(ge=KIB, description="Size of its records, decompressed.")] = 8 * MIB
    records_per_batch_max: Annotated[int, Meta(ge=1, description="Positions that one envelope covers.")] = 50_000
    keys_per_map_max: Annotated[int, Meta(ge=1, description="Keys of a record's metrics, or of its labels.")] = 256
    text_bytes_max: Annotated[int, Meta(ge=1, description="UTF-8 bytes of a record's text.")] = 64 * KIB
    zstd_window_bytes_max: Annotated[int, Meta(ge=KIB, description="Window a zstd frame may ask for.")] = 8 * MIB


class Compression(Enum):
    """How `Envelope.batch` is compressed."""

    NONE = record_pb2.COMPRESSION_NONE
    ZSTD = record_pb2.COMPRESSION_ZSTD


class RejectReason(Enum):
    """Why an envelope was refused. The value is the metric label and the quarantine's reason."""

    UNDECODABLE = "undecodable"
    ENVELOPE_BYTES = "envelope_bytes"
    HEADER = "header"
    CHECKSUM = "checksum"
    COMPRESSION = "compression"
    DECOMPRESSED_BYTES = "decompressed_bytes"
    RECORD_COUNT = "record_count"
    KEYS_PER_MAP = "keys_per_map"
    TEXT_BYTES = "text_bytes"
    DEVICE_NAME = "device_name"
    IDENTITY_REUSED = "identity_reused"


class Rejected(Permanent):
    """An envelope that cannot be processed, now or ever.

    Attributes:
        reason: the rule that it broke.
        header: a gaps-only batch with the range that the envelope claims, when its header could be read. It is only
            a claim: do not settle it before the device's name has been checked against its credentials.
    """

    def __init__(self, reason: RejectReason, detail: str, header: RecordBatch | None = None) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail
        self.header = header


@dataclass(frozen=True, slots=True)
class EncodedEnvelope:
    """An envelope ready for the wire, with the identity that it carries."""

    device_id: str
    spool_id: bytes
    first_sequence: int
    record_count: int
    stream: str
    payload: bytes


def encode(batch: RecordBatch, compression: Compression = Compression.ZSTD, level: int = 1) -> EncodedEnvelope:
    """Serialises a batch into an envelope.

    Args:
        batch: what to send.
        compression: applied to the records; a receipt (all gaps) is never compressed.
        level: zstd level, 1 (fast) to 19.
    """
    body = batch.data
    used = Compression.NONE
    if body and compression is Compression.ZSTD:
        body = zstandard.ZstdCompressor(level=level, write_checksum=False).compress(body)
        used = compression
    envelope = record_pb2.Envelope(
        device_id=batch.device_id,
        spool_id=batch.spool_id,
        first_sequence=batch.first_sequence,
        record_count=batch.record_count,
        stream=batch.stream,
        site=batch.site,
        sensitivity=int(batch.sensitivity),  # type: ignore[arg-type]
        compression=used.value,
        batch=body,
        checksum=google_crc32c.value(body),
        gaps=[
            record_pb2.Gap(first_sequence=g.first_sequence, count=g.count, reason=int(g.reason))  # type: ignore[arg-type]
            for g in batch.gaps
        ],
        traceparent=batch.traceparent,
        tracestate=batch.tracestate,
        received_time_us=batch.received_time_us,
    )
    envelope.header_checksum = header_checksum(envelope)
    return EncodedEnvelope(
        device_id=batch.device_id,
        spool_id=batch.spool_id,
        first_sequence=batch.first_sequence,
        record_count=batch.record_count,
        stream=batch.stream,
        payload=envelope.SerializeToString(),
    )


def decode(payload: bytes, limits: Limits) -> RecordBatch:
    """Parses and verifies an envelope. The records come back in canonical form: known fields only.

    Raises:
        Rejected: with the reason and, where the header could be read, the claimed range.
    """
    envelope, header = decode_header(payload, limits)
    body = _decompress(envelope, header, limits)
    present = header_present_count(envelope)
    data = _canonical(body, present, header, limits)
    traceparent, tracestate = _trace_context(envelope)
    return RecordBatch(
        device_id=envelope.device_id,
        spool_id=envelope.spool_id,
        first_sequence=envelope.first_sequence,
        record_count=envelope.record_count,
        stream=envelope.stream,
        site=envelope.site,
        data=data,
        sensitivity=header.sensitivity,
        gaps=_gaps(envelope),
        received_time_us=envelope.received_time_us,
        traceparent=traceparent,
        tracestate=tracestate,
    )


def decode_header(payload: bytes, limits: Limits) -> tuple[record_pb2.Envelope, RecordBatch]:
    """Parses the envelope and validates all but its records.

    Returns:
        The message, and the claimed range as a gaps-only batch (reason QUARANTINED where no gap was declared).

    Raises:
        Rejected: oversize, undecodable, a header that breaks a rule, or one that covers too many positions (which
            claims its range all the same: whoever sent it must not have to send it for ever).
    """
    if len(payload) > limits.envelope_bytes_max:
        detail = f"{len(payload)} bytes, limits.envelope_bytes_max is {limits.envelope_bytes_max}"
        raise Rejected(RejectReason.ENVELOPE_BYTES, detail)
    try:
        envelope = record_pb2.Envelope.FromString(payload)
    except DecodeError as error:
        raise Rejected(RejectReason.UNDECODABLE, str(error)) from error
    envelope.DiscardUnknownFields()
    too_many = envelope.record_count > limits.records_per_batch_max
    try:
        _validate_header(envelope)
        # Beyond the limit nobody reads its gaps, of which there may be as many: all of its range counts as refused.
        gaps = () if too_many else _gaps(envelope)
    except Permanent as error:
        raise Rejected(RejectReason.HEADER, str(error)) from error
    if header_checksum(envelope) != envelope.header_checksum:
        # Without a header to claim: what it says of its identity is what is in doubt.
        raise Rejected(RejectReason.CHECKSUM, "crc32c of the header differs from the envelope's")
    header = _claim(envelope, gaps)
    if too_many:
        detail = f"{envelope.record_count} positions, limits.records_per_batch_max is {limits.records_per_batch_max}"
        raise Rejected(RejectReason.RECORD_COUNT, detail, header)
    return envelope, header


def _claim(envelope: record_pb2.Envelope, gaps: tuple[Gap, ...]) -> RecordBatch:
    bare = RecordBatch(
        device_id=envelope.device_id,
        spool_id=envelope.spool_id,
        first_sequence=envelope.first_sequence,
        record_count=envelope.record_count,
        stream=envelope.stream,
        site=envelope.site,
        data=b"",
        sensitivity=_sensitivity(envelope),
        gaps=gaps,
        received_time_us=envelope.received_time_us,
    )
    return bare.receipt(GapReason.QUARANTINED)


def claimed_range(payload: bytes, limits: Limits, envelope_bytes_max: int) -> RecordBatch | None:
    """What a refused envelope claims to cover, as a gaps-only batch, when its header can be read; else None.

    Args:
        payload: the envelope.
        limits: that it was refused under.
        envelope_bytes_max: instead of that in `limits`: too large to be processed may be small enough to be looked at.
    """
    try:
        return decode_header(payload, replace(limits, envelope_bytes_max=envelope_bytes_max))[1]
    except Rejected as error:
        return error.header


def header_checksum(envelope: record_pb2.Envelope) -> int:
    """The crc32c of the fields that decide identity and fate, as `protos/record.proto` defines it."""
    packed = bytearray()
    for text in (envelope.device_id.encode(), envelope.spool_id, envelope.stream.encode(), envelope.site.encode()):
        packed += struct.pack("<I", len(text)) + text
    packed += struct.pack(
        "<QIIII",
        envelope.first_sequence,
        envelope.record_count,
        envelope.sensitivity & _U32,
        envelope.compression & _U32,
        envelope.checksum,
    )
    for gap in envelope.gaps:
        packed += struct.pack("<QII", gap.first_sequence, gap.count, gap.reason & _U32)
    return int(google_crc32c.value(bytes(packed)))


def header_present_count(envelope: record_pb2.Envelope) -> int:
    """How many records a validated envelope must hold."""
    return int(envelope.record_count - sum(gap.count for gap in envelope.gaps))


def _validate_header(envelope: record_pb2.Envelope) -> None:
    validate_name("device", envelope.device_id)
    validate_name("site", envelope.site)
    validate_name("stream", envelope.stream)
    if len(envelope.spool_id) != SPOOL_ID_BYTES:
        raise Permanent(f"spool_id has {len(envelope.spool_id)} bytes instead of {SPOOL_ID_BYTES}")
    if envelope.record_count < 1:
        raise Permanent("record_count is 0")
    if envelope.first_sequence + envelope.record_count > SEQUENCE_MAX:
        raise Permanent(f"first_sequence {envelope.first_sequence} is beyond 63 bits")
    stop = envelope.first_sequence + envelope.record_count
    if len(envelope.gaps) > envelope.record_count:
        raise Permanent(f"{len(envelope.gaps)} gaps in {envelope.record_count} positions")
    for gap in envelope.gaps:
        if gap.count == 0 or gap.first_sequence < envelope.first_sequence or gap.first_sequence + gap.count > stop:
            raise Permanent(f"gap at {gap.first_sequence} (+{gap.count}) lies outside the envelope's range")


def _gaps(envelope: record_pb2.Envelope) -> tuple[Gap, ...]:
    try:
        gaps = merge_gaps(Gap(g.first_sequence, g.count, GapReason(g.reason)) for g in envelope.gaps)
    except ValueError as error:
        raise Permanent(f"unknown gap reason: {error}") from error
    if any(gap.reason is GapReason.UNSPECIFIED for gap in gaps):
        raise Permanent("a gap without a reason")  # a loss that nobody explains; the ledger would have no column for it
    return gaps


def _trace_context(envelope: record_pb2.Envelope) -> tuple[str, str]:
    """The trace context, or empty strings where it is not one: tracing must not decide what becomes of a record."""
    parent, state = envelope.traceparent, envelope.tracestate
    if not _TRACEPARENT.match(parent):
        return "", ""
    return parent, state if len(state) <= _TRACESTATE_CHARS_MAX and _TRACESTATE.match(state) else ""


def _sensitivity(envelope: record_pb2.Envelope) -> Sensitivity:
    """The declared sensitivity; a value that we do not know is sensitive."""
    try:
        return Sensitivity(envelope.sensitivity)
    except ValueError:
        return Sensitivity.SENSITIVE


def _decompress(envelope: record_pb2.Envelope, header: RecordBatch, limits: Limits) -> bytes:
    if google_crc32c.value(envelope.batch) != envelope.checksum:
        raise Rejected(RejectReason.CHECKSUM, "crc32c of the batch differs from the envelope's", header)
    limit = limits.decompressed_bytes_max
    body: bytes | None
    if envelope.compression == record_pb2.COMPRESSION_NONE or not envelope.batch:
        body = envelope.batch
    elif envelope.compression == record_pb2.COMPRESSION_ZSTD:
        try:
            body = _inflate(envelope.batch, limit, limits.zstd_window_bytes_max)
        except zstandard.ZstdError as error:
            raise Rejected(RejectReason.COMPRESSION, f"zstd: {error}", header) from error
    else:
        raise Rejected(RejectReason.COMPRESSION, f"unknown compression {envelope.compression}", header)
    if body is None or len(body) > limit:
        detail = f"more than limits.decompressed_bytes_max = {limit} bytes after decompression"
        raise Rejected(RejectReason.DECOMPRESSED_BYTES, detail, header)
    return body


def _inflate(frame: bytes, limit: int, window_bytes_max: int) -> bytes | None:
    """Decompresses one whole zstd frame, or returns None when it holds more than `limit` bytes.

    Raises:
        zstandard.ZstdError: not a frame, cut short, or with bytes behind it.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=window_bytes_max)
    stated = zstandard.get_frame_parameters(frame).content_size
    if stated != zstandard.CONTENTSIZE_UNKNOWN:
        # The size may be stated because it is verified: a frame with more or less in it is an error.
        return decompressor.decompress(frame, allow_extra_data=False) if stated <= limit else None
    with decompressor.stream_reader(frame, read_across_frames=False) as reader:
        if len(reader.read(limit + 1)) > limit:
            return None
    # It is within the limit, which made a second pass safe: this one knows where the frame ends.
    whole = zstandard.ZstdDecompressor(max_window_size=window_bytes_max).decompressobj()
    body = whole.decompress(frame)
    if not whole.eof or whole.unused_data:
        raise zstandard.ZstdError("the frame is cut short, or something follows it")
    return body


def _canonical(body: bytes, present: int, header: RecordBatch, limits: Limits) -> bytes:
    """The records with known fields only and maps in key order, after their number and their limits were checked."""
    frames = _parse(record_pb2.RecordFrames, body, header).records
    if len(frames) != present:
        detail = f"{len(frames)} records where the header leaves {present} positions for them"
        raise Rejected(RejectReason.RECORD_COUNT, detail, header)
    parsed = _parse(record_pb2.RecordBatch, body, header)
    parsed.DiscardUnknownFields()
    # A frame this short cannot break a per-record limit, so a batch of ordinary records costs one max() in C.
    safe_bytes = min(limits.text_bytes_max, _MAP_ENTRY_BYTES_MIN * limits.keys_per_map_max)
    if max(map(len, frames), default=0) > safe_bytes:
        for frame, record in zip(frames, parsed.records, strict=True):
            if len(frame) > safe_bytes:
                _check_record(record, header, limits)
    if parsed.ByteSize() > limits.decompressed_bytes_max:
        detail = f"more than limits.decompressed_bytes_max = {limits.decompressed_bytes_max} bytes in canonical form"
        raise Rejected(RejectReason.DECOMPRESSED_BYTES, detail, header)
    # Maps in key order: the same records give the same bytes in every process, so that resends can be compared.
    return parsed.SerializeToString(deterministic=True)


def _parse(kind: type[_M], body: bytes, header: RecordBatch) -> _M:
    try:
        return kind.FromString(body)
    except DecodeError as error:
        raise Rejected(RejectReason.UNDECODABLE, f"records: {error}", header) from error


def _check_record(record: record_pb2.Record, header: RecordBatch, limits: Limits) -> None:
    keys = max(len(record.metrics), len(record.labels))
    if keys > limits.keys_per_map_max:
        detail = f"a record has {keys} keys in one map, limits.keys_per_map_max is {limits.keys_per_map_max}"
        raise Rejected(RejectReason.KEYS_PER_MAP, detail, header)
    if len(record.text.encode()) > limits.text_bytes_max:
        detail = f"a record's text is longer than limits.text_bytes_max = {limits.text_bytes_max} bytes"
        raise Rejected(RejectReason.TEXT_BYTES, detail, header)
