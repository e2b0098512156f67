"""Records, batches and their identity.

Invariants:
  * A record is known by `(device_id, spool_id, sequence)`. Sequences are allocated by a spool, from 0, without holes.
  * A batch covers `[first_sequence, first_sequence + record_count)` of one device and one stream; each position is a
    record or lies in a gap. `data` holds the records outside the gaps, in order, as one serialised
    `protos.record_pb2.RecordBatch`.
  * Work on whole batches (counting, slicing, joining) is done by C calls on `data`, never by Python per record.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from typing import Final

from protos import record_pb2
from sluice.errors import Permanent
from sluice.intervals import IntervalSet, runs_of

SPOOL_ID_BYTES: Final = 16
# Sequences live in a signed 64-bit column of the lake.
SEQUENCE_MAX: Final = 2**63 - 1
# Names become MQTT topic levels, Kafka keys and directory names: nothing that any of them treats specially.
NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


class Sensitivity(IntEnum):
    """What the source declares; the gateway decides. Equal to `protos` Sensitivity."""

    UNSPECIFIED = 0
    PUBLIC = 1
    INTERNAL = 2
    SENSITIVE = 3


class GapReason(IntEnum):
    """Why a position holds no record. Equal to `protos` GapReason."""

    UNSPECIFIED = 0
    WITHHELD = 1
    EXPIRED = 2
    QUARANTINED = 3
    DROPPED = 4


class Route(Enum):
    """Where the gateway sends a record."""

    CLOUD = "cloud"
    LOCAL = "local"
    REDACT = "redact"
    DROP = "drop"
    QUARANTINE = "quarantine"


@dataclass(frozen=True, slots=True)
class Record:
    """One observation.

    Attributes:
        event_time_us: UTC microseconds since 1970, by the device's clock.
        text: free text, such as a log line.
        metrics: measurements by name.
        labels: dimensions by name.
        payload: opaque bytes, described by `content_type` (a MIME type).
    """

    event_time_us: int
    text: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    payload: bytes = b""
    content_type: str = ""

    def to_message(self) -> record_pb2.Record:
        """The record as a protobuf message.

        Raises:
            Permanent: when a value does not fit the wire (text that is not valid Unicode, a time beyond 64 bits).
        """
        try:
            return record_pb2.Record(
                event_time_us=self.event_time_us,
                text=self.text,
                metrics=self.metrics,
                labels=self.labels,
                payload=self.payload,
                content_type=self.content_type,
            )
        except (ValueError, TypeError, UnicodeError) as error:
            raise Permanent(f"record does not fit the wire format: {error}") from error

    @classmethod
    def from_message(cls, message: record_pb2.Record) -> "Record":
        """The record that a protobuf message holds."""
        return cls(
            event_time_us=message.event_time_us,
            text=message.text,
            metrics=dict(message.metrics),
            labels=dict(message.labels),
            payload=message.payload,
            content_type=message.content_type,
        )


@dataclass(frozen=True, slots=True)
class Gap:
    """A run of `count` positions from `first_sequence` on that hold no record here, and why."""

    first_sequence: int
    count: int
    reason: GapReason

    @property
    def stop_sequence(self) -> int:
        """The first sequence behind the gap."""
        return self.first_sequence + self.count


@dataclass(frozen=True, slots=True)
class RecordBatch:
    """A non-empty run of positions of one device and one stream (see the module's invariants).

    Attributes:
        data: the present records as a serialised `RecordBatch` message, uncompressed; empty when all positions are
            gaps (a *receipt*).
        received_time_us: when the gateway received it, UTC microseconds; 0 before the gateway.
        traceparent, tracestate: W3C trace context; empty when tracing is off.
    """

    device_id: str
    spool_id: bytes
    first_sequence: int
    record_count: int
    stream: str
    site: str
    data: bytes
    sensitivity: Sensitivity = Sensitivity.UNSPECIFIED
    gaps: tuple[Gap, ...] = ()
    received_time_us: int = 0
    traceparent: str = ""
    tracestate: str = ""

    @property
    def stop_sequence(self) -> int:
        """The first sequence behind the batch."""
        return self.first_sequence + self.record_count

    @property
    def present_count(self) -> int:
        """How many positions hold a record."""
        return self.record_count - sum(gap.count for gap in self.gaps)

    @property
    def identity(self) -> tuple[str, bytes, int]:
        """`(device_id, spool_id, first_sequence)`."""
        return self.device_id, self.spool_id, self.first_sequence

    def frames(self) -> Sequence[bytes]:
        """The present records, each as its serialised bytes, in order."""
        return record_pb2.RecordFrames.FromString(self.data).records

    def messages(self) -> Sequence[record_pb2.Record]:
        """The present records as protobuf messages, in order."""
        return record_pb2.RecordBatch.FromString(self.data).records

    def present_runs(self) -> Iterator[tuple[int, int]]:
        """The runs `[start, stop)` of positions that hold a record, in order."""
        at = self.first_sequence
        for gap in self.gaps:
            if gap.first_sequence > at:
                yield at, gap.first_sequence
            at = gap.stop_sequence
        if at < self.stop_sequence:
            yield at, self.stop_sequence

    def sequences(self) -> Iterator[int]:
        """The sequences of the present records, in order; parallel to `frames()` and `messages()`."""
        for start, stop in self.present_runs():
            yield from range(start, stop)

    def without(self, sequences: Iterable[int], reason: GapReason) -> "RecordBatch":
        """The same range with the records at `sequences` taken out and declared as gaps.

        Args:
            sequences: sequences of present records, in any order.
            reason: why they are not here.
        """
        gone = set(sequences)
        if not gone:
            return self
        assert min(gone) >= self.first_sequence, "a sequence below the batch"
        assert max(gone) < self.stop_sequence, "a sequence beyond the batch"
        kept = [frame for sequence, frame in zip(self.sequences(), self.frames(), strict=True) if sequence not in gone]
        added = (Gap(start, stop - start, reason) for start, stop in runs_of(sorted(gone)))
        gaps = merge_gaps((*self.gaps, *added))
        return replace(self, data=join_frames(kept), gaps=gaps)

    def receipt(self, reason: GapReason) -> "RecordBatch":
        """The same range with no record at all: present ones become gaps with `reason`, existing gaps stay."""
        added = (Gap(start, stop - start, reason) for start, stop in self.present_runs())
        return replace(self, data=b"", gaps=merge_gaps((*self.gaps, *added)))


def join_frames(frames: Sequence[bytes]) -> bytes:
    """The serialised `RecordBatch` made of serialised records."""
    return record_pb2.RecordFrames(records=frames).SerializeToString()


def merge_gaps(gaps: Iterable[Gap]) -> tuple[Gap, ...]:
    """Sorts gaps and joins neighbours of the same reason.

    Raises:
        Permanent: when two gaps overlap: a position has one fate.
    """
    merged: list[Gap] = []
    for gap in sorted(gaps, key=lambda g: g.first_sequence):
        if merged and gap.first_sequence < merged[-1].stop_sequence:
            raise Permanent(f"gaps overlap at sequence {gap.first_sequence}")
        if merged and merged[-1].stop_sequence == gap.first_sequence and merged[-1].reason == gap.reason:
            merged[-1] = Gap(merged[-1].first_sequence, merged[-1].count + gap.count, gap.reason)
        else:
            merged.append(gap)
    return tuple(merged)


def covered(batches: Iterable[RecordBatch]) -> IntervalSet:
    """The sequences that the batches cover, records and gaps alike."""
    return IntervalSet((b.first_sequence, b.stop_sequence) for b in batches)


def validate_name(kind: str, name: str) -> str:
    """Returns `name` when it may name a site, device or stream.

    Raises:
        Permanent: naming the kind, the value and the rule.
    """
    if not NAME_PATTERN.match(name):
        raise Permanent(
            f"{kind} {name[:64]!r} is not a valid name: 1 to 128 of A-Z a-z 0-9 . _ -, beginning with a letter or digit"
        )
    return name
