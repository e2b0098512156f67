"""Where a subscription begins: latest, earliest, a time or a resume token become an offset in every partition.

All four are exact: "latest" is the end of each partition at a moment between the request and the first message.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from central.feed_hub import FeedHub
from central.feed_log import Bounds, OffsetGone
from central.filters import FeedFilter
from central.tokens import Partition, Position, ResumePoint, TokenSigner
from protos import feed_pb2
from sluice.connections import KafkaConfig
from sluice.errors import Permanent

TIME_US_MAX: Final = 2**53  # the year 2255; a bound that Kafka's milliseconds hold


async def resolve(
    start: feed_pb2.Start, selection: FeedFilter, hub: FeedHub, signer: TokenSigner, kafka: KafkaConfig
) -> ResumePoint:
    """The point that a subscription begins at.

    Raises:
        Permanent: the start makes no sense, or the token is not ours.
        OffsetGone: the token points outside of what Kafka holds.
        Retryable: Kafka does not answer.
    """
    topics = topics_of(selection, kafka)
    chosen = start.WhichOneof("at") or "latest"
    opened = signer.open(start.resume_token) if chosen == "resume_token" else None
    bounds = {partition: held for partition, held in (await hub.bounds()).items() if partition[0] in topics}
    if opened is not None:
        return resume(opened, bounds)
    if chosen == "time_us":
        if not 0 <= start.time_us <= TIME_US_MAX:
            raise Permanent(f"start.time_us: {start.time_us} is not a time in UTC microseconds")
        offsets = await hub.offsets_at(bounds, start.time_us)
        positions = {p: Position(max(held.low, offsets.get(p, held.high))) for p, held in bounds.items()}
        return ResumePoint(positions, start.time_us)
    earliest = chosen == "earliest" and start.earliest
    return ResumePoint({p: Position(held.low if earliest else held.high) for p, held in bounds.items()})


def topics_of(selection: FeedFilter, kafka: KafkaConfig) -> frozenset[str]:
    """The topics that hold the wanted kinds."""
    topic_of = {feed_pb2.KIND_RECORDS: kafka.records_topic, feed_pb2.KIND_RESULTS: kafka.results_topic}
    return frozenset(topic_of[kind] for kind in selection.kinds)


def resume(point: ResumePoint, bounds: Mapping[Partition, Bounds]) -> ResumePoint:
    """The point of a token, checked against what the partitions of the wanted kinds hold. Pure.

    A partition that was added since the token was issued begins at its first entry; kinds that the new filter does not
    want are dropped from the point.

    Raises:
        Permanent: the token does not cover a wanted kind.
        OffsetGone: a position is outside of what Kafka holds.
    """
    known_topics = {topic for topic, _ in point.positions}
    for topic in _topics(bounds):
        if topic not in known_topics:
            raise Permanent(f"resume token: it does not cover topic {topic}; ask for the kinds it was issued for")
    positions: dict[Partition, Position] = {}
    for partition, held in bounds.items():
        position = point.positions.get(partition, Position(held.low))
        if not held.low <= position.offset <= held.high:
            raise OffsetGone(partition, position.offset, held)
        positions[partition] = position
    for partition, position in point.positions.items():
        if partition[0] in _topics(bounds) and partition not in bounds:
            raise OffsetGone(partition, position.offset)
    return ResumePoint(positions, point.not_before_us)


def _topics(partitions: Iterable[Partition]) -> frozenset[str]:
    return frozenset(topic for topic, _ in partitions)
