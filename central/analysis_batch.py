"""Envelopes into texts, analyses into results. Pure.

A result carries the identity of its record: device, spool and sequence. Only records that have text are analysed.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from central.feed_analyze import to_result
from protos import feed_pb2
from sluice.codec import Limits, decode, decode_header

if TYPE_CHECKING:
    from engine.service import Analysis


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of one envelope; `sequences`, `event_times_us` and `texts` are parallel and not empty."""

    device_id: str
    spool_id: bytes
    site: str
    stream: str
    sequences: Sequence[int]
    event_times_us: Sequence[int]
    texts: Sequence[str]


def read_texts(value: bytes, limits: Limits, streams: re.Pattern[str] | None) -> Texts | None:
    """The texts of an envelope; None when its stream is not wanted or no record has text.

    Args:
        value: the envelope.
        limits: of envelopes.
        streams: matches the wanted streams; None for all.

    Raises:
        Rejected: when it does not decode.
    """
    envelope, header = decode_header(value, limits)
    if not envelope.batch or (streams is not None and streams.match(header.stream) is None):
        return None
    batch = decode(value, limits)
    rows = [(s, m.event_time_us, m.text) for s, m in zip(batch.sequences(), batch.messages(), strict=True) if m.text]
    if not rows:
        return None
    sequences, times, texts = zip(*rows, strict=True)
    return Texts(batch.device_id, batch.spool_id, batch.site, batch.stream, sequences, times, texts)


def batches_of_results(
    texts: Texts,
    analyses: "Sequence[Analysis]",
    *,
    task: str,
    created_time_us: int,
    bytes_max: int,
) -> Iterator[feed_pb2.ResultBatch]:
    """The results, in batches of about `bytes_max` bytes; texts with an error have none.

    Args:
        texts: what was analysed.
        analyses: one per text.
        task: of the engine.
        created_time_us: now, UTC microseconds.
        bytes_max: a batch is closed when it has reached this size.
    """
    # All texts of a call are analysed by one model, also while it is being replaced.
    made_by = analyses[0]

    def empty() -> feed_pb2.ResultBatch:
        return feed_pb2.ResultBatch(
            device_id=texts.device_id,
            spool_id=texts.spool_id,
            site=texts.site,
            stream=texts.stream,
            origin=feed_pb2.ORIGIN_CLOUD,
            task=task,
            model=made_by.model,
            model_version=made_by.model_version,
            created_time_us=created_time_us,
        )

    batch, batch_bytes = empty(), 0
    for sequence, time_us, analysis in zip(texts.sequences, texts.event_times_us, analyses, strict=True):
        if analysis.error is not None:
            continue
        result = to_result(analysis, sequence, time_us)
        batch.results.append(result)
        batch_bytes += result.ByteSize()
        if batch_bytes >= bytes_max:
            yield batch
            batch, batch_bytes = empty(), 0
    if batch.results:
        yield batch
