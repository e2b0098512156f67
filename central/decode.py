"""Kafka messages to Arrow rows, in whole chunks.

Envelopes are verified by `sluice.codec` (size, header, checksum, bounded decompression, counts); what passes is turned
into columns by `ptars` (Rust, straight from the wire), with a loop over parsed messages as fallback and as the oracle
that tests hold it against. The codec's canonical form has neither unknown fields nor duplicate map keys, which ptars
would keep and DuckDB refuse to read.

One bad message never fails its neighbours: a chunk that ptars refuses is halved until the bad one stands alone,
that one is tried with the loop, and if this fails too it is `Bad`, for the quarantine.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from protos import record_pb2
from sluice.codec import Limits, Rejected, RejectReason, claimed_range, decode
from sluice.record import GapReason, RecordBatch

_ENTRY_TYPES = {"metrics": pa.map_(pa.string(), pa.float64()), "labels": pa.map_(pa.string(), pa.string())}
RECORD_TYPE = pa.struct(
    [
        ("event_time_us", pa.int64()),
        ("text", pa.string()),
        ("metrics", _ENTRY_TYPES["metrics"]),
        ("labels", _ENTRY_TYPES["labels"]),
        ("payload", pa.binary()),
        ("content_type", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Message:
    """A Kafka message.

    Attributes:
        app: its partition, as `cluster/topic/partition`.
        timestamp_us: of the log, UTC microseconds; 0 when there is none.
    """

    app: str
    topic: str
    partition: int
    offset: int
    value: bytes
    timestamp_us: int = 0
    headers: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Good:
    """A verified envelope.

    Attributes:
        rows: its records, of RECORD_TYPE, in order; parallel to `batch.sequences()`.
    """

    message: Message
    batch: RecordBatch
    rows: pa.StructArray


@dataclass(frozen=True, slots=True)
class Bad:
    """A message that cannot be processed, now or ever.

    Attributes:
        reason: a metric label and the quarantine's reason.
        header: the range that it claims, as a batch of gaps, when its header could be read.
    """

    message: Message
    reason: str
    detail: str
    header: RecordBatch | None = None


class RecordDecoder(Protocol):
    """Serialised `RecordBatch` messages to columns."""

    def decode(self, bodies: Sequence[bytes]) -> list[pa.StructArray]:
        """The records of each body, of RECORD_TYPE.

        Raises:
            ValueError: one of them cannot be decoded.
        """
        ...


class PtarsDecoder:
    """The fast path. It holds the GIL during a call, so a call should be a few megabytes."""

    def __init__(self) -> None:
        from ptars import HandlerPool, PtarsConfig

        pool = HandlerPool([record_pb2.DESCRIPTOR], config=PtarsConfig(timestamp_unit="us"))
        self._handler: Any = pool.get_for_message(record_pb2.RecordBatch.DESCRIPTOR)

    def decode(self, bodies: Sequence[bytes]) -> list[pa.StructArray]:
        """See `RecordDecoder`."""
        try:
            lists = self._handler.list_to_record_batch(list(bodies)).column(0)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise ValueError(f"ptars: {error}") from error
        offsets = lists.offsets.to_pylist()
        records = lists.values.cast(RECORD_TYPE)
        return [records.slice(a, b - a) for a, b in itertools.pairwise(offsets)]


class LoopDecoder:
    """Python over parsed messages: slow, and right by construction."""

    def decode(self, bodies: Sequence[bytes]) -> list[pa.StructArray]:
        """See `RecordDecoder`."""
        return [_rows_of(record_pb2.RecordBatch.FromString(body).records) for body in bodies]


def _rows_of(records: Sequence[record_pb2.Record]) -> pa.StructArray:
    columns = [
        pa.array([r.event_time_us for r in records], pa.int64()),
        pa.array([r.text for r in records], pa.string()),
        pa.array([list(r.metrics.items()) for r in records], _ENTRY_TYPES["metrics"]),
        pa.array([list(r.labels.items()) for r in records], _ENTRY_TYPES["labels"]),
        pa.array([r.payload for r in records], pa.binary()),
        pa.array([r.content_type for r in records], pa.string()),
    ]
    return pa.StructArray.from_arrays(columns, fields=list(RECORD_TYPE))


class EnvelopeDecoder:
    """Envelopes to rows.

    Args:
        limits: of one envelope.
        fast: the decoder that is tried first.
        fallback: for a body that `fast` refuses.
    """

    def __init__(
        self, limits: Limits, fast: RecordDecoder | None = None, fallback: RecordDecoder | None = None
    ) -> None:
        self._limits = limits
        self._fast = fast or PtarsDecoder()
        self._fallback = fallback or LoopDecoder()

    def decode(self, messages: Sequence[Message]) -> list[Good | Bad]:
        """One outcome per message, in order."""
        outcomes: list[Good | Bad | None] = []
        verified: list[tuple[int, RecordBatch]] = []
        for index, message in enumerate(messages):
            try:
                batch = decode(message.value, self._limits)
            except Rejected as error:
                outcomes.append(self._refused(message, error))
                continue
            outcomes.append(None)
            verified.append((index, batch))
        decoded = self._rows([batch.data for _, batch in verified])
        for (index, batch), rows in zip(verified, decoded, strict=True):
            outcomes[index] = _outcome(messages[index], batch, rows)
        return [outcome for outcome in outcomes if outcome is not None]

    def _refused(self, message: Message, error: Rejected) -> Bad:
        header = error.header
        if error.reason is RejectReason.ENVELOPE_BYTES:
            # It has left its device's spool: its positions must meet a fate here, or the books never balance.
            header = claimed_range(message.value, self._limits, len(message.value))
        return Bad(message, error.reason.value, error.detail, header)

    def _rows(self, bodies: Sequence[bytes]) -> list[pa.StructArray | ValueError]:
        """The rows of each body, or why there are none; halves what is refused until the bad one stands alone."""
        if not bodies:
            return []
        try:
            return list(self._fast.decode(bodies))
        except ValueError:
            if len(bodies) > 1:
                middle = len(bodies) // 2
                return self._rows(bodies[:middle]) + self._rows(bodies[middle:])
        try:
            return list(self._fallback.decode(bodies))
        except Exception as error:  # noqa: BLE001 - whatever it is, this message must not stop the partition
            return [ValueError(f"{type(error).__name__}: {error}")]


def _outcome(message: Message, batch: RecordBatch, rows: pa.StructArray | ValueError) -> Good | Bad:
    if isinstance(rows, ValueError):
        return Bad(message, "undecodable", str(rows), batch.receipt(GapReason.QUARANTINED))
    if len(rows) != batch.present_count:
        detail = f"{len(rows)} rows where the header leaves {batch.present_count} positions for them"
        return Bad(message, "record_count", detail, batch.receipt(GapReason.QUARANTINED))
    return Good(message, batch, rows)
