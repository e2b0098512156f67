"""What a batch becomes when it is decided: the part that stays, the part that leaves, and why.

Invariants:
  * `LocalBatch` and `ExportBatch` are unrelated types. The bridge takes only an `ExportBatch`, and local analysis only
    a `LocalBatch`, so that a mix-up is a type error and not an incident.
  * An `ExportBatch` is built field by field by `ExportBatch.of`: what has no line there cannot leave. It always covers
    the whole range of the batch that it was made of: a record that does not leave is a declared gap.
  * Indices count the *present* records of a batch (`RecordBatch.sequences()`), not its positions.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from sluice.intervals import runs_of
from sluice.record import Gap, GapReason, RecordBatch, Route, Sensitivity, join_frames, merge_gaps

# W3C Trace Context, version 00: hexadecimal only, so that no text can ride out in it.
_TRACEPARENT: Final = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}\Z")


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a record goes, and why.

    Attributes:
        route: the outcome. Whatever is neither CLOUD nor DROP stays on the site.
        rule: name of the rule that decided.
        found: names of the detectors that matched, sorted; never what they matched.
    """

    route: Route
    rule: str
    found: tuple[str, ...] = ()

    @property
    def leaves(self) -> bool:
        """Whether the record may be exported."""
        return self.route is Route.CLOUD

    @property
    def stays(self) -> bool:
        """Whether the record is kept on the site. Anything unknown is: the doubt is on the side of the person."""
        return self.route not in {Route.CLOUD, Route.DROP}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decisions for a batch: one for most records, and the exceptions by index among the present records."""

    default: Decision
    exceptions: Mapping[int, Decision] = field(default_factory=lambda: MappingProxyType({}))

    def at(self, index: int) -> Decision:
        """The decision for the record at `index` among the present ones."""
        return self.exceptions.get(index, self.default)


@dataclass(frozen=True, slots=True)
class LocalBatch:
    """Records that stay on the site.

    Attributes:
        sequences: of the records, ascending; not necessarily contiguous; never empty.
        frames: the records, each as a serialised `Record`, canonical; parallel to `sequences`.
        why: the decision for each; parallel to `sequences`.
        received_time_us: when the gateway received them, UTC microseconds.
    """

    device_id: str
    spool_id: bytes
    site: str
    stream: str
    sensitivity: Sensitivity
    received_time_us: int
    sequences: tuple[int, ...]
    frames: tuple[bytes, ...]
    why: tuple[Decision, ...]

    def __post_init__(self) -> None:
        assert self.sequences, "a local batch holds at least one record"
        assert len(self.sequences) == len(self.frames) == len(self.why), "parallel lists"

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def size_bytes(self) -> int:
        """Bytes of all frames."""
        return sum(map(len, self.frames))

    @classmethod
    def of(cls, batch: RecordBatch, verdict: Verdict) -> "LocalBatch | None":
        """The records of `batch` that stay; None when there are none."""
        rows = [
            (sequence, frame, decision)
            for index, (sequence, frame) in enumerate(zip(batch.sequences(), batch.frames(), strict=True))
            if (decision := verdict.at(index)).stays
        ]
        if not rows:
            return None
        sequences, frames, why = zip(*rows, strict=True)
        return cls(
            device_id=batch.device_id,
            spool_id=batch.spool_id,
            site=batch.site,
            stream=batch.stream,
            sensitivity=batch.sensitivity,
            received_time_us=batch.received_time_us,
            sequences=sequences,
            frames=frames,
            why=why,
        )


@dataclass(frozen=True, slots=True)
class ExportBatch:
    """What may leave the site. Make it with `of` or `receipt` only.

    The fields are those of `RecordBatch`, without `tracestate`: it is free text of the device's making.
    """

    device_id: str
    spool_id: bytes
    first_sequence: int
    record_count: int
    stream: str
    site: str
    sensitivity: Sensitivity
    data: bytes
    gaps: tuple[Gap, ...]
    received_time_us: int
    traceparent: str

    @classmethod
    def of(cls, batch: RecordBatch, withheld: Mapping[GapReason, Iterable[int]]) -> "ExportBatch":
        """The whole range of `batch`, with the records at some sequences taken out and declared.

        Args:
            batch: in canonical form, as `codec.decode` gives it: known fields only.
            withheld: sequences of present records by the reason for which they do not leave; disjoint.
        """
        gone = {reason: sorted(sequences) for reason, sequences in withheld.items()}
        out = {sequence for sequences in gone.values() for sequence in sequences}
        assert len(out) == sum(map(len, gone.values())), "a record has one fate"
        added = [Gap(a, b - a, reason) for reason, sequences in gone.items() for a, b in runs_of(sequences)]
        return cls(
            device_id=batch.device_id,
            spool_id=batch.spool_id,
            first_sequence=batch.first_sequence,
            record_count=batch.record_count,
            stream=batch.stream,
            site=batch.site,
            sensitivity=batch.sensitivity,
            data=_kept(batch, out) if out else batch.data,
            gaps=merge_gaps((*batch.gaps, *added)),
            received_time_us=batch.received_time_us,
            traceparent=batch.traceparent if _TRACEPARENT.match(batch.traceparent) else "",
        )

    @classmethod
    def receipt(cls, batch: RecordBatch, reason: GapReason) -> "ExportBatch":
        """The whole range of `batch` without any record: the cloud's ledger closes and sees nothing."""
        return cls.of(batch.receipt(reason), {})

    def to_record_batch(self) -> RecordBatch:
        """For the codec."""
        return RecordBatch(
            device_id=self.device_id,
            spool_id=self.spool_id,
            first_sequence=self.first_sequence,
            record_count=self.record_count,
            stream=self.stream,
            site=self.site,
            data=self.data,
            sensitivity=self.sensitivity,
            gaps=self.gaps,
            received_time_us=self.received_time_us,
            traceparent=self.traceparent,
        )


def _kept(batch: RecordBatch, out: set[int]) -> bytes:
    if len(out) == batch.present_count:
        return b""
    return join_frames([f for s, f in zip(batch.sequences(), batch.frames(), strict=True) if s not in out])
