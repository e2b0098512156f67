"""From observations to numbered envelopes: what sources hand over, and what the spool stores.

A `Chunk` is a source's unit of delivery: serialised records of one stream, and the source's place behind them. A
`BatchDraft` is a closed batch that waits for its sequences; the spool gives them and stores the encoded envelope.

A record that breaks a limit is refused whole, with the limit's name, and never altered.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from sluice.codec import Compression, Limits, RejectReason, decode_header, encode
from sluice.errors import Permanent
from sluice.record import Gap, GapReason, Record, RecordBatch, Sensitivity, join_frames
from sluice.spool import Declare

# Field tag and length of one record inside a batch.
FRAME_OVERHEAD_BYTES: Final = 6
# Names, identity and checksums around the records, rounded up.
ENVELOPE_OVERHEAD_BYTES: Final = 2048
# Stream of a receipt when the envelope that named it is damaged.
UNKNOWN_STREAM: Final = "unknown"


class RecordRefused(Permanent):
    """A record that breaks a limit; it was not accepted.

    Attributes:
        reason: the limit's name, as the gateway would give it.
    """

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(f"record refused: {detail}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class StreamKey:
    """What the records of one envelope have in common."""

    stream: str
    sensitivity: Sensitivity = Sensitivity.UNSPECIFIED
    priority: int = 5


@dataclass(frozen=True, slots=True)
class Chunk:
    """Serialised records of one stream, in order.

    Attributes:
        frames: each record as its protobuf bytes.
        oldest_time_us: event time of the oldest, UTC microseconds.
        cursors: the source's places behind these records; a place of None is forgotten.
        urgent: somebody waits for it to be durable.
    """

    key: StreamKey
    frames: Sequence[bytes]
    oldest_time_us: int
    cursors: Mapping[str, bytes | None] = field(default_factory=dict)
    urgent: bool = False

    @property
    def size_bytes(self) -> int:
        """Size of the records in a batch, uncompressed."""
        return sum(map(len, self.frames)) + FRAME_OVERHEAD_BYTES * len(self.frames)


@dataclass(frozen=True, slots=True)
class BatchDraft:
    """A closed batch. `encode` numbers it (see `sluice.spool.Draft`)."""

    device_id: str
    site: str
    key: StreamKey
    frames: Sequence[bytes]
    oldest_time_us: int
    compression_level: int = 1

    @property
    def record_count(self) -> int:
        """How many records."""
        return len(self.frames)

    @property
    def priority(self) -> int:
        """0 to 9; higher is sent first."""
        return self.key.priority

    def encode(self, spool_id: bytes, first_sequence: int) -> bytes:
        """The envelope's bytes."""
        batch = RecordBatch(
            device_id=self.device_id,
            spool_id=spool_id,
            first_sequence=first_sequence,
            record_count=len(self.frames),
            stream=self.key.stream,
            site=self.site,
            data=join_frames(self.frames),
            sensitivity=self.key.sensitivity,
        )
        return encode(batch, Compression.ZSTD, self.compression_level).payload


def serialize(record: Record, limits: Limits) -> bytes:
    """The record's bytes, when it keeps all limits.

    Raises:
        RecordRefused: naming the limit.
        Permanent: it does not fit the wire format.
    """
    text_bytes = len(record.text) if record.text.isascii() else len(record.text.encode("utf-8", "surrogatepass"))
    if text_bytes > limits.text_bytes_max:
        detail = f"its text has {text_bytes} bytes, limits.text_bytes_max is {limits.text_bytes_max}"
        raise RecordRefused(RejectReason.TEXT_BYTES, detail)
    keys = max(len(record.metrics), len(record.labels))
    if keys > limits.keys_per_map_max:
        detail = f"it has {keys} keys in one map, limits.keys_per_map_max is {limits.keys_per_map_max}"
        raise RecordRefused(RejectReason.KEYS_PER_MAP, detail)
    frame = record.to_message().SerializeToString()
    if len(frame) > frame_bytes_max(limits):
        detail = f"it has {len(frame)} bytes, one envelope holds {frame_bytes_max(limits)}"
        raise RecordRefused(RejectReason.ENVELOPE_BYTES, detail)
    return frame


def frame_bytes_max(limits: Limits) -> int:
    """The largest record that fits an envelope even when it does not compress (zstd may add 1/256)."""
    body = min(limits.envelope_bytes_max, limits.decompressed_bytes_max)
    return body - body // 128 - ENVELOPE_OVERHEAD_BYTES


def declare_expired(device_id: str, site: str, limits: Limits) -> Declare:
    """Makes the envelopes by which a device declares records expired: gaps only."""

    def declare(spool_id: bytes, first_sequence: int, count: int, payload: bytes | None) -> bytes:
        stream, sensitivity = UNKNOWN_STREAM, Sensitivity.UNSPECIFIED
        if payload is not None:
            try:
                header = decode_header(payload, limits)[1]
                stream, sensitivity = header.stream, header.sensitivity
            except Permanent:
                # Its CRC was right, so it was written so: under limits that were larger then.
                stream = UNKNOWN_STREAM
        batch = RecordBatch(
            device_id=device_id,
            spool_id=spool_id,
            first_sequence=first_sequence,
            record_count=count,
            stream=stream,
            site=site,
            data=b"",
            sensitivity=sensitivity,
            gaps=(Gap(first_sequence, count, GapReason.EXPIRED),),
        )
        return encode(batch).payload

    return declare
