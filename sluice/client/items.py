"""What a client gets, typed. Built from the wire's messages; knows no gRPC."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from protos import feed_pb2
from sluice.record import Record


@dataclass(frozen=True, slots=True)
class RecordItem:
    """A record with its identity `(device_id, spool_id, sequence)`.

    Attributes:
        received_time_us: when the gateway received it, UTC microseconds.
        record: the record; its `event_time_us` is the device's clock.
    """

    device_id: str
    spool_id: bytes
    sequence: int
    site: str
    stream: str
    received_time_us: int
    record: Record


@dataclass(frozen=True, slots=True)
class ResultItem:
    """What the engine says of one record, with the record's identity.

    Attributes:
        origin: `cloud`, or `site` for a record that stayed there.
        event_time_us: of the record.
        created_time_us: of the result.
        score: confidence in [0, 1]; of a model made for regression, its number.
        novelty: distance to what the stream usually says, in [0, 2]; 0 when not computed.
        embedding: little-endian float16; empty when not asked for.
        truncated: the text was longer than the model reads.
    """

    device_id: str
    spool_id: bytes
    sequence: int
    site: str
    stream: str
    origin: Literal["cloud", "site"]
    task: str
    model: str
    model_version: str
    event_time_us: int
    created_time_us: int
    label: str
    score: float
    novelty: float
    embedding: bytes
    token_count: int
    truncated: bool


Item = RecordItem | ResultItem


@dataclass(frozen=True, slots=True)
class TextSpan:
    """A part of a text, such as a name: `text[start:end]`, what it is, and how sure that is in [0, 1]."""

    start: int
    end: int
    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Batch:
    """Items that came together.

    Attributes:
        items: all records or all results of one device and stream; not empty.
        resume_token: continues exactly behind this batch.
    """

    items: tuple[Item, ...]
    resume_token: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """What the engine says of one text, or why it says nothing.

    Attributes:
        index: of the text among those given.
        spans: parts of the text with labels of their own, in order (task `tokens`).
        error: None, or a text; `error_code` is then `invalid`, `overloaded`, `deadline_exceeded` or `internal`.
    """

    index: int
    text: str
    label: str = ""
    score: float = 0.0
    novelty: float = 0.0
    embedding: bytes = b""
    token_count: int = 0
    truncated: bool = False
    model: str = ""
    model_version: str = ""
    error: str | None = None
    error_code: str = ""
    spans: tuple[TextSpan, ...] = ()


def items_of(message: feed_pb2.FeedBatch) -> tuple[Item, ...]:
    """The items of a message; none for heartbeat and drain."""
    kind = message.WhichOneof("body")
    if kind == "records":
        return tuple(_records(message.records))
    if kind == "results":
        return tuple(_results(message.results))
    return ()


def answer_of(index: int, text: str, response: feed_pb2.AnalyzeResponse) -> Answer:
    """The answer that a response holds."""
    if response.HasField("error"):
        code = feed_pb2.AnalyzeError.Code.Name(response.error.code).removeprefix("CODE_").lower()
        return Answer(index, text, error=response.error.message, error_code=code)
    result = response.result
    return Answer(
        index=index,
        text=text,
        label=result.label,
        score=result.score,
        novelty=result.novelty,
        embedding=result.embedding,
        token_count=result.token_count,
        truncated=result.truncated,
        model=response.model,
        model_version=response.model_version,
        spans=tuple(TextSpan(span.start, span.end, span.label, span.score) for span in result.spans),
    )


def _records(batch: feed_pb2.FeedRecords) -> Iterator[RecordItem]:
    for row in batch.records:
        yield RecordItem(
            device_id=batch.device_id,
            spool_id=batch.spool_id,
            sequence=row.sequence,
            site=batch.site,
            stream=batch.stream,
            received_time_us=batch.received_time_us,
            record=Record.from_message(row.record),
        )


def _results(batch: feed_pb2.ResultBatch) -> Iterator[ResultItem]:
    for row in batch.results:
        yield ResultItem(
            device_id=batch.device_id,
            spool_id=batch.spool_id,
            sequence=row.sequence,
            site=batch.site,
            stream=batch.stream,
            origin="site" if batch.origin == feed_pb2.ORIGIN_SITE else "cloud",
            task=batch.task,
            model=batch.model,
            model_version=batch.model_version,
            event_time_us=row.event_time_us,
            created_time_us=batch.created_time_us,
            label=row.label,
            score=row.score,
            novelty=row.novelty,
            embedding=row.embedding,
            token_count=row.token_count,
            truncated=row.truncated,
        )
