import os
from pathlib import Path

import grpc

from tests.central.feed_support import Listener, Topics, envelope, running_feed, stub, until

ENVELOPES = 120
RECORD_BYTES = 60_000
RING_BYTES = 1_000_000


def incompressible(first: int) -> bytes:
    return envelope(first, 1, text=os.urandom(RECORD_BYTES // 2).hex())


async def test_a_stalled_subscriber_slows_nobody_costs_bounded_memory_and_loses_nothing(
    topics: Topics, tmp_path: Path
) -> None:
    settings = {"ring_bytes_max": RING_BYTES, "part_cache_bytes_max": RING_BYTES, "stall_deadline_s": 2.0}
    async with (
        running_feed(topics, tmp_path, **settings) as (feed, target),
        stub(target) as slow_client,
        stub(target) as client,
    ):
        stalled = await Listener(slow_client).begun()
        live = await Listener(client).begun()
        for first in range(ENVELOPES):
            topics.records(incompressible(first), partition=first % 2)
        assert await live.records(ENVELOPES) == list(range(ENVELOPES))
        assert sum(ring.bytes_held for ring in feed._hub.rings.values()) <= RING_BYTES
        assert feed._maker._cache.bytes_held <= RING_BYTES
        await until(lambda: feed._subscribers == 1, "the stalled one was cut off")

        # What was under way to it is still there to be read; then it is told why it was cut off.
        assert await stalled.end() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(stalled.sequences) * RECORD_BYTES < 4_000_000, "gRPC ran far ahead of the client"
        resumed = Listener(client, resume_token=stalled.token)
        left = ENVELOPES - len(stalled.sequences)
        assert left > ENVELOPES // 2
        assert sorted(stalled.sequences + await resumed.records(left)) == list(range(ENVELOPES))


async def test_one_that_reads_slower_than_the_ring_turns_over_gets_everything_in_order(
    topics: Topics, tmp_path: Path
) -> None:
    async with running_feed(topics, tmp_path, ring_bytes_max=RING_BYTES) as (feed, target), stub(target) as client:
        slow = await Listener(client).begun()
        rings = feed._hub.rings
        for first in range(0, ENVELOPES, 10):
            topics.records(*(incompressible(first + i) for i in range(10)))
            await slow.next()
        partition = (topics.kafka.records_topic, 0)
        await until(lambda: rings[partition].end_offset == ENVELOPES, "the ring is at the end")
        assert rings[partition].start_offset > len(slow.sequences), "the ring has turned over"
        await slow.records(ENVELOPES)
        assert slow.sequences == list(range(ENVELOPES))
        # It is back in the ring: what it read older data with was given back.
        await until(lambda: feed._hub.catch_up_permits._value == 16, "caught up")


async def test_only_so_many_catch_up_at_once_and_one_more_is_told_to_come_again(topics: Topics, tmp_path: Path) -> None:
    topics.records(*(incompressible(i) for i in range(40)))
    settings = {"ring_bytes_max": 1000, "catch_up_max": 1, "catch_up_wait_s": 0.1, "stall_deadline_s": 30}
    async with running_feed(topics, tmp_path, **settings) as (_, target), stub(target) as one, stub(target) as two:
        first = await Listener(one, earliest=True).begun()
        await first.next()
        refused = await Listener(two, earliest=True).begun()
        code, details = await refused.refusal()
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "feed.catch_up_max" in details
        assert await first.records(40) == list(range(40))
        assert await Listener(two, resume_token=refused.token).records(40) == list(range(40))


async def test_cancelled_subscriptions_leave_nothing_behind(topics: Topics, tmp_path: Path) -> None:
    topics.records(*(envelope(i, 1) for i in range(50)))
    async with running_feed(topics, tmp_path, ring_bytes_max=100) as (feed, target), stub(target) as client:
        for round_number in range(40):
            listener = Listener(client, **({"earliest": True} if round_number % 2 else {}))
            await listener.begun()
            listener.call.cancel()
        await until(lambda: feed._subscribers == 0, "all have ended")
        await until(lambda: feed._hub.catch_up_permits._value == 16, "all permits are back")
