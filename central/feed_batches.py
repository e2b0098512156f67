"""Entries of the Kafka log as messages of the feed: `FeedBatch` bodies, serialised once and shared by all subscribers.

A `FeedBatch` is a body followed by a resume token. Serialised protobuf fields may be concatenated, so the body is built
once and each subscriber's token is appended to it; `message` does this.

An envelope that exceeds `batch_bytes_max` decompressed becomes several parts, so that clients with gRPC's default limit
of 4 MiB can read it; a part knows the index of the record behind it, which is where a resume token points.

Fails: `Permanent` for an entry that does not decode. The lake quarantines it; the feed counts it and passes it over.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from central.filters import FeedFilter
from central.tokens import Partition
from protos import feed_pb2, record_pb2
from sluice.codec import Limits, decode
from sluice.errors import Permanent

# Field tags, (number << 3) | 2: length-delimited.
_BODY_RECORDS: Final = b"\x0a"  # FeedBatch.records = 1
_BODY_RESULTS: Final = b"\x12"  # FeedBatch.results = 2
_BODY_TOKEN: Final = b"\x2a"  # FeedBatch.resume_token = 5
_RECORDS_ITEM: Final = b"\x32"  # FeedRecords.records = 6
_ITEM_SEQUENCE: Final = b"\x08"  # FeedRecord.sequence = 1, a varint
_ITEM_RECORD: Final = b"\x12"  # FeedRecord.record = 2


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a batch comes from; what filters look at first."""

    site: str
    device: str
    stream: str


@dataclass(slots=True)
class Entry:
    """One message of the log, as read from Kafka. `origin` is filled in by `peek`."""

    kind: int
    partition: Partition
    offset: int
    append_time_us: int
    value: bytes
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """A body, and what it covers.

    Attributes:
        body: a serialised `FeedBatch` without its token.
        count: records or results in it.
        stop_index: index, within the entry, of the first record behind this part; 0 when the part ends the entry.
    """

    body: bytes
    count: int
    stop_index: int


def peek(entry: Entry) -> Origin:
    """The origin of an entry, without decompressing its records.

    Raises:
        Permanent: when it does not parse.
    """
    if entry.origin is None:
        try:
            if entry.kind == feed_pb2.KIND_RECORDS:
                envelope = record_pb2.Envelope.FromString(entry.value)
                entry.origin = Origin(envelope.site, envelope.device_id, envelope.stream)
            else:
                results = feed_pb2.ResultBatch.FromString(entry.value)
                entry.origin = Origin(results.site, results.device_id, results.stream)
        except DecodeError as error:
            raise Permanent(f"undecodable: {error}") from error
    return entry.origin


def build(entry: Entry, limits: Limits, batch_bytes_max: int, first_index: int = 0) -> list[Part]:
    """The parts of an entry, unfiltered, from its record number `first_index` on.

    Raises:
        Permanent: when it does not decode.
    """
    if entry.kind == feed_pb2.KIND_RECORDS:
        return list(_record_parts(entry.value, limits, batch_bytes_max, first_index))
    return _result_parts(_parse_results(entry.value))


def build_selected(entry: Entry, selection: FeedFilter) -> list[Part]:
    """The part of a results entry that holds what the filter wants; none when it wants nothing of it.

    Raises:
        Permanent: when it does not decode.
    """
    batch = _parse_results(entry.value)
    wanted = selection.select(batch.results)
    if len(wanted) < len(batch.results):
        del batch.results[:]
        batch.results.extend(wanted)
    return _result_parts(batch)


def message(body: bytes, token: bytes) -> bytes:
    """The serialised `FeedBatch` of a body and a resume token."""
    return b"".join((body, _BODY_TOKEN, _varint(len(token)), token))


def heartbeat_body(time_us: int) -> bytes:
    """The body that tells a quiet stream from a dead one."""
    return feed_pb2.FeedBatch(heartbeat=feed_pb2.Heartbeat(server_time_us=time_us)).SerializeToString()


def drain_body(reason: str) -> bytes:
    """The body that sends a client elsewhere."""
    return feed_pb2.FeedBatch(drain=feed_pb2.Drain(reason=reason)).SerializeToString()


def _record_parts(value: bytes, limits: Limits, batch_bytes_max: int, first_index: int) -> Iterator[Part]:
    batch = decode(value, limits)
    header = feed_pb2.FeedRecords(
        device_id=batch.device_id,
        spool_id=batch.spool_id,
        site=batch.site,
        stream=batch.stream,
        received_time_us=batch.received_time_us,
    ).SerializeToString()
    chunk = [header]
    chunk_bytes = len(header)
    count = 0
    for index, (sequence, frame) in enumerate(zip(batch.sequences(), batch.frames(), strict=True)):
        if index < first_index:
            continue
        if count and chunk_bytes + len(frame) > batch_bytes_max:
            yield Part(_body(_BODY_RECORDS, chunk), count, index)
            chunk, chunk_bytes, count = [header], len(header), 0
        # The records are spliced in as they are, never parsed: a FeedRecord is its sequence, then the record's bytes.
        number, size = _varint(sequence), _varint(len(frame))
        item_bytes = 2 + len(number) + len(size) + len(frame)
        chunk += (_RECORDS_ITEM, _varint(item_bytes), _ITEM_SEQUENCE, number, _ITEM_RECORD, size, frame)
        chunk_bytes += item_bytes
        count += 1
    if count:
        yield Part(_body(_BODY_RECORDS, chunk), count, 0)


def _result_parts(batch: feed_pb2.ResultBatch) -> list[Part]:
    if not batch.results:
        return []
    return [Part(_body(_BODY_RESULTS, [batch.SerializeToString()]), len(batch.results), 0)]


def _parse_results(value: bytes) -> feed_pb2.ResultBatch:
    try:
        batch = feed_pb2.ResultBatch.FromString(value)
    except DecodeError as error:
        raise Permanent(f"undecodable: {error}") from error
    batch.DiscardUnknownFields()
    return batch


def _body(tag: bytes, chunks: list[bytes]) -> bytes:
    return b"".join((tag, _varint(sum(map(len, chunks))), *chunks))


def _varint(value: int) -> bytes:
    """Protobuf's base-128 encoding of a non-negative integer."""
    if value < 0x80:
        return bytes((value,))
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
