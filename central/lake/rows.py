"""Messages to rows: the columns of `schema`, from verified envelopes, results, statuses and quarantine notices.

Times: the event's time is the device's word. It is believed when it is a time at all (`schema.EVENT_TIME_US_MIN/MAX`);
it decides the row's `date` only when it lies near the time of receipt, so that a lying clock makes no tiny files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from google.protobuf.message import DecodeError

from central.decode import Bad, Good, Message
from central.lake.config import LakeConfig
from central.lake.schema import EVENT_TIME_US_MAX, EVENT_TIME_US_MIN, RECORDS, TIMESTAMP
from protos import control_pb2, feed_pb2, record_pb2
from sluice.errors import Permanent
from sluice.record import SEQUENCE_MAX, SPOOL_ID_BYTES, Gap, RecordBatch, validate_name

DAY_US = 86_400_000_000
_ORIGINS = {feed_pb2.ORIGIN_CLOUD: "cloud", feed_pb2.ORIGIN_SITE: "site"}
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of records of one envelope that belong in the lake: `rows` begin at `first_sequence`."""

    good: Good
    rows: pa.StructArray
    first_sequence: int


def is_sane(time_us: int) -> bool:
    """Whether a time can have been meant."""
    return EVENT_TIME_US_MIN < time_us < EVENT_TIME_US_MAX


def received_us(claimed_us: int, message: Message, now_us: int) -> int:
    """The gateway's time of receipt, or the log's, or now: the first that can have been meant."""
    return next(t for t in (claimed_us, message.timestamp_us, now_us) if is_sane(t))


def days(event_us: Ints, receipt_us: Ints, config: LakeConfig) -> Ints:
    """The `date` of rows, as days since 1970."""
    age_us = receipt_us - event_us
    near = (age_us <= int(config.date_past_s_max * 1e6)) & (-age_us <= int(config.date_future_s_max * 1e6))
    return np.where(near, event_us, receipt_us) // DAY_US


def record_table(pieces: Sequence[Piece], config: LakeConfig, now_us: int) -> pa.Table:
    """Rows of `records`."""
    counts = [len(piece.rows) for piece in pieces]
    records = pa.concat_arrays([piece.rows for piece in pieces])
    owner = pa.array(np.repeat(np.arange(len(pieces), dtype=np.int32), counts))

    def per_envelope(values: list[Any], kind: pa.DataType) -> pa.Array:
        return pa.array(values, kind).take(owner)

    batches = [piece.good.batch for piece in pieces]
    receipt = [received_us(p.good.batch.received_time_us, p.good.message, now_us) for p in pieces]
    receipt_us = np.repeat(np.array(receipt, dtype=np.int64), counts)
    said_us = records.field("event_time_us").to_numpy()
    valid = (said_us > EVENT_TIME_US_MIN) & (said_us < EVENT_TIME_US_MAX)
    event_us = np.where(valid, said_us, receipt_us)
    sequences = [np.arange(p.first_sequence, p.first_sequence + len(p.rows)) for p in pieces]
    columns = {
        "device_id": per_envelope([b.device_id for b in batches], pa.string()),
        "spool_id": per_envelope([b.spool_id.hex() for b in batches], pa.string()),
        "sequence": pa.array(np.concatenate(sequences).astype(np.int64)),
        "site": per_envelope([b.site for b in batches], pa.string()),
        "event_time": pa.array(event_us).cast(TIMESTAMP),
        "received_time": pa.array(receipt_us).cast(TIMESTAMP),
        "event_time_valid": pa.array(valid),
        "event_time_device_us": pa.array(said_us, mask=valid),
        "sensitivity": per_envelope([b.sensitivity.name.lower() for b in batches], pa.string()),
        **{n: records.field(n) for n in ("text", "metrics", "labels", "payload", "content_type")},
        "stream": per_envelope([b.stream for b in batches], pa.string()),
        "date": pa.array(days(event_us, receipt_us, config).astype(np.int32)).cast(pa.date32()),
    }
    return pa.table([columns[name] for name in RECORDS.names], schema=RECORDS)


def gap_values(batch: RecordBatch, gap: Gap, receipt_us: int) -> dict[str, Any]:
    """A row of `ledger`."""
    return {
        "device_id": batch.device_id,
        "spool_id": batch.spool_id.hex(),
        "first_sequence": gap.first_sequence,
        "count": gap.count,
        "reason": gap.reason.name.lower(),
        "site": batch.site,
        "stream": batch.stream,
        "received_time": receipt_us,
        "date": receipt_us // DAY_US,
    }


def quarantine_values(bad: Bad, now_us: int) -> dict[str, Any]:
    """A row of `quarantine` for a message that cannot be processed here; it keeps the original bytes."""
    message, header = bad.message, bad.header
    receipt_us = received_us(header.received_time_us if header else 0, message, now_us)
    return {
        "device_id": header.device_id if header else None,
        "spool_id": header.spool_id.hex() if header else None,
        "first_sequence": header.first_sequence if header else None,
        "record_count": header.record_count if header else None,
        "site": header.site if header else None,
        "stream": header.stream if header else None,
        "reason": bad.reason,
        "detail": bad.detail[:1000],
        "received_time": receipt_us,
        "original": message.value,
        "original_bytes": len(message.value),
        "origin": f"{message.topic}/{message.partition}/{message.offset}",
        **_place(message),
        "date": receipt_us // DAY_US,
    }


def notice_values(message: Message, now_us: int) -> dict[str, Any]:
    """A row of `quarantine` for a notice of the gateway. One that cannot be read is kept as it is."""
    try:
        notice = record_pb2.Quarantined.FromString(message.value)
        known = bool(notice.reason)
    except DecodeError:
        known = False
    if not known:
        reason = message.headers.get("reason", b"").decode(errors="replace") or "unreadable_notice"
        return quarantine_values(Bad(message, reason, "not a quarantine notice; kept as received"), now_us)
    receipt_us = received_us(notice.received_time_us, message, now_us)
    return {
        "device_id": notice.device_id or None,
        "spool_id": notice.spool_id.hex() or None,
        "first_sequence": _bigint(notice.first_sequence),
        "record_count": notice.record_count,
        "site": notice.site or None,
        "stream": notice.stream or None,
        "reason": notice.reason,
        "detail": notice.detail[:1000],
        "received_time": receipt_us,
        "original": notice.original,
        "original_bytes": _bigint(max(notice.original_bytes, len(notice.original))),
        "origin": notice.origin,
        **_place(message),
        "date": receipt_us // DAY_US,
    }


def status_values(message: Message, now_us: int) -> dict[str, Any]:
    """A row of `status`.

    Raises:
        Permanent: it is not the status of a device.
    """
    try:
        status = control_pb2.Status.FromString(message.value)
    except DecodeError as error:
        raise Permanent(f"undecodable: {error}") from error
    _check_identity(status.device_id, status.site, status.spool_id)
    if status.next_sequence > SEQUENCE_MAX:
        raise Permanent(f"next_sequence {status.next_sequence} is beyond 63 bits")
    receipt_us = received_us(status.received_time_us, message, now_us)
    ranges = [(r.first, r.last) for r in status.spool_ranges if r.first <= r.last < SEQUENCE_MAX]
    return {
        "device_id": status.device_id,
        "spool_id": status.spool_id.hex(),
        "site": status.site,
        "next_sequence": status.next_sequence,
        "spool_records": _bigint(status.spool_records),
        "spool_bytes": _bigint(status.spool_bytes),
        "spool_oldest_time_us": status.spool_oldest_time_us,
        "spool_ranges": [{"start": first, "stop": last + 1} for first, last in ranges],
        "agent_version": status.agent_version,
        "uptime_s": status.uptime_s,
        "online": status.online,
        "expired_records": _bigint(status.expired_records),
        "status_time_us": status.status_time_us,
        "received_time": receipt_us,
        "date": receipt_us // DAY_US,
    }


def parse_results(message: Message) -> feed_pb2.ResultBatch:
    """A verified batch of results.

    Raises:
        Permanent: it cannot be decoded, or its identity breaks a rule.
    """
    try:
        batch = feed_pb2.ResultBatch.FromString(message.value)
    except DecodeError as error:
        raise Permanent(f"undecodable: {error}") from error
    _check_identity(batch.device_id, batch.site, batch.spool_id)
    validate_name("stream", batch.stream)
    if any(result.sequence >= SEQUENCE_MAX for result in batch.results):
        raise Permanent("a result's sequence is beyond 63 bits")
    return batch


def result_key(batch: feed_pb2.ResultBatch) -> tuple[str, ...]:
    """What makes results comparable, in the order of `reading.RESULT_COLUMNS`."""
    origin = _ORIGINS.get(batch.origin, "cloud")
    return batch.task, batch.model, batch.model_version, origin, batch.device_id, batch.spool_id.hex()


def result_values(
    batch: feed_pb2.ResultBatch, results: Sequence[feed_pb2.Result], message: Message, config: LakeConfig, now_us: int
) -> list[dict[str, Any]]:
    """Rows of `results`."""
    created_us = received_us(batch.created_time_us, message, now_us)
    said_us = np.array([result.event_time_us for result in results], dtype=np.int64)
    event_us = np.where((said_us > EVENT_TIME_US_MIN) & (said_us < EVENT_TIME_US_MAX), said_us, created_us)
    dates = days(event_us, np.full_like(event_us, created_us), config)
    task, model, model_version, origin, device_id, spool_id = result_key(batch)
    shared = {
        "device_id": device_id,
        "spool_id": spool_id,
        "site": batch.site,
        "origin": origin,
        "task": task,
        "model": model,
        "model_version": model_version,
        "created_time": created_us,
        "stream": batch.stream,
    }
    return [
        {
            **shared,
            "sequence": result.sequence,
            "event_time": time_us,
            "label": result.label,
            "score": result.score,
            "novelty": result.novelty,
            "embedding": result.embedding,
            "token_count": min(result.token_count, 2**31 - 1),
            "truncated": result.truncated,
            "date": date,
        }
        for result, time_us, date in zip(results, event_us.tolist(), dates.tolist(), strict=True)
    ]


def _check_identity(device_id: str, site: str, spool_id: bytes) -> None:
    validate_name("device", device_id)
    validate_name("site", site)
    if len(spool_id) != SPOOL_ID_BYTES:
        raise Permanent(f"spool_id has {len(spool_id)} bytes instead of {SPOOL_ID_BYTES}")


def _place(message: Message) -> dict[str, Any]:
    return {"topic": message.topic, "partition": message.partition, "offset": message.offset}


def _bigint(value: int) -> int:
    """An unsigned 64-bit value in a signed column."""
    return min(value, SEQUENCE_MAX)
