import asyncio
import time
from pathlib import Path

import grpc
import pytest

from central.config import FeedConfig
from central.feed_batches import Entry
from central.feed_hub import FeedHub
from central.feed_subscribe import Maker, Subscription
from central.filters import FeedFilter
from central.tokens import Position, ResumePoint, TokenSigner
from protos import feed_pb2
from sluice.connections import KafkaConfig
from sluice.telemetry import Telemetry
from tests.brokers.base import KafkaBroker
from tests.central.feed_support import LIMITS, SILENT, Listener, Topics, envelope, results, running_feed, stub, until

# Small enough that a few envelopes push each other out of the ring.
TINY_RING = 2_000


async def test_earliest_gives_all_and_latest_exactly_what_comes_after_the_first_message(
    topics: Topics, tmp_path: Path
) -> None:
    topics.records(*(envelope(i * 10, 10) for i in range(25)))
    async with running_feed(topics, tmp_path) as (_, target), stub(target) as client:
        everything = await Listener(client, earliest=True).begun()
        assert await everything.records(250) == list(range(250))
        # The embedded broker's own answer for the end would be 24 entries too early here.
        topics.records(*(envelope(250 + i * 10, 10) for i in range(25)))
        latest = await Listener(client).begun()
        topics.records(envelope(500, 3), partition=1)
        assert await latest.records(3) == [500, 501, 502]
        assert await everything.records(503) == list(range(503))


async def test_one_that_begins_behind_the_ring_passes_the_seam_without_loss_or_repeat(
    topics: Topics, tmp_path: Path
) -> None:
    topics.records(*(envelope(i, 1) for i in range(100)))
    async with running_feed(topics, tmp_path, ring_bytes_max=TINY_RING) as (feed, target), stub(target) as client:
        listener = await Listener(client, earliest=True).begun()
        for start in range(100, 400, 20):
            topics.records(*(envelope(i, 1) for i in range(start, start + 10)))
            topics.records(*(envelope(i, 1) for i in range(start + 10, start + 20)), partition=1)
            await listener.until(lambda seen, enough=start // 2: len(seen.sequences) >= enough)
        assert await listener.records(400) == list(range(400))
        first = [s for s in listener.sequences if s < 100 or s % 20 < 10]
        assert first == sorted(first), "one partition's records keep their order"
        assert all(ring.bytes_held <= TINY_RING for ring in feed._hub.rings.values())


async def test_a_token_resumes_by_identity_across_a_restart_of_the_server(topics: Topics, tmp_path: Path) -> None:
    token, seen = b"", []
    for part in range(3):
        topics.records(*(envelope(part * 100 + i * 10, 10) for i in range(10)), partition=part % 2)
        topics.results(*(results(part * 100 + i, ["x"]) for i in range(100)))
        async with running_feed(topics, tmp_path) as (_, target), stub(target) as client:
            at = {"resume_token": token} if token else {"earliest": True}
            listener = Listener(client, **at)
            # Stop in the middle of what there is.
            await listener.until(lambda it: len(it.sequences) >= 50 and len(it.results) >= 30)
            listener.call.cancel()
            token = listener.token
            seen.append(listener)
    async with running_feed(topics, tmp_path) as (_, target), stub(target) as client:
        last = await Listener(client, resume_token=token).begun()
        left = 600 - sum(len(it.sequences) + len(it.results) for it in seen)
        await last.until(lambda it: len(it.sequences) + len(it.results) >= left)
        seen.append(last)
    assert sorted(s for it in seen for s in it.sequences) == list(range(300))
    assert sorted(s for it in seen for s, _ in it.results) == list(range(300))


async def test_a_large_envelope_comes_in_parts_and_resumes_between_them(topics: Topics, tmp_path: Path) -> None:
    topics.records(envelope(0, 1000, text="x" * 100))
    async with running_feed(topics, tmp_path, batch_bytes_max=10_000) as (_, target), stub(target) as client:
        first = Listener(client, earliest=True)
        await first.until(lambda it: len(it.sequences) >= 300)
        first.call.cancel()
        assert len(first.sequences) < 1000
        second = Listener(client, resume_token=first.token)
        await second.until(lambda it: len(it.sequences) >= 1000 - len(first.sequences))
        assert first.sequences + second.sequences == list(range(1000))
        assert max(batch.ByteSize() for batch in second.batches) < 12_000


async def test_a_filter_gives_what_matches_and_the_token_covers_what_does_not(topics: Topics, tmp_path: Path) -> None:
    topics.records(envelope(0, 5, stream="syslog"), envelope(5, 5, stream="host"), envelope(10, 5, stream="syslog"))
    topics.results(results(0, ["disk", "ok"], [0.9, 0.9]), results(2, ["disk"], [0.1]), results(3, ["ok"]))
    async with running_feed(topics, tmp_path) as (_, target), stub(target) as client:
        wanted = feed_pb2.Filter(streams=["sys*"], kinds=[feed_pb2.KIND_RECORDS])
        assert await Listener(client, wanted, earliest=True).records(10) == [*range(5), *range(10, 15)]
        wanted = feed_pb2.Filter(labels=["disk"], score_min=0.5, kinds=[feed_pb2.KIND_RESULTS])
        listener = Listener(client, wanted, earliest=True)
        await listener.until(lambda it: len(it.results) == 1)
        # A heartbeat carries the position behind what the filter held back.
        await listener.until(lambda it: it.batches[-1].WhichOneof("body") == "heartbeat")
        assert listener.results == [(0, "disk")]
        topics.results(results(7, ["disk"], [0.8]))
        everything = Listener(client, feed_pb2.Filter(kinds=[feed_pb2.KIND_RESULTS]), resume_token=listener.token)
        await everything.until(lambda it: len(it.results) == 1)
        assert everything.results == [(7, "disk")]


async def test_a_time_begins_at_the_first_entry_appended_then_or_later(topics: Topics, tmp_path: Path) -> None:
    topics.records(*(envelope(i, 1) for i in range(20)))
    await asyncio.sleep(0.01)  # Kafka's times have milliseconds: the next entry must not share one
    middle_us = time.time_ns() // 1000 // 1000 * 1000
    topics.records(*(envelope(i, 1) for i in range(20, 30)))
    async with running_feed(topics, tmp_path) as (_, target), stub(target) as client:
        assert await Listener(client, time_us=middle_us).records(10) == list(range(20, 30))
        later = await Listener(client, time_us=middle_us + 3_600_000_000).begun()
        resumed = await Listener(client, resume_token=later.token).begun()
        assert not resumed.sequences


async def test_broken_entries_are_counted_and_passed_over(topics: Topics, tmp_path: Path) -> None:
    topics.records(envelope(0, 1), b"\xff garbage", envelope(1, 1)[:-3] + b"\x00\x00\x00", b"", envelope(2, 1))
    topics.results(b"\xff garbage", results(9, ["x"]))
    async with running_feed(topics, tmp_path) as (feed, target), stub(target) as client:
        listener = await Listener(client, earliest=True).begun()
        await listener.until(lambda it: len(it.sequences) == 2 and len(it.results) == 1)
        assert listener.sequences == [0, 2]
        skipped = feed._telemetry.registry.get_sample_value
        assert skipped("sluice_feed_entry_skipped_entries_total", {"topic": topics.kafka.records_topic}) >= 2
        assert skipped("sluice_feed_entry_skipped_entries_total", {"topic": topics.kafka.results_topic}) == 1


async def test_a_quiet_stream_has_heartbeats_with_tokens(topics: Topics, tmp_path: Path) -> None:
    async with running_feed(topics, tmp_path, heartbeat_s=0.05) as (_, target), stub(target) as client:
        listener = await Listener(client).begun()
        for _ in range(3):
            batch = await listener.next()
            assert batch is not None
            assert abs(batch.heartbeat.server_time_us / 1e6 - time.time()) < 30
            assert batch.resume_token


@pytest.mark.parametrize(
    ("at", "said"),
    [
        ({"resume_token": b"forged" * 20}, "resume token"),
        ({"resume_token": b"\x01" + b"x" * 100}, "another server"),
        ({"time_us": -5}, "start.time_us"),
    ],
)
async def test_a_start_that_makes_no_sense_is_an_invalid_argument(
    topics: Topics, tmp_path: Path, at: dict[str, object], said: str
) -> None:
    async with running_feed(topics, tmp_path) as (_, target), stub(target) as client:
        code, details = await Listener(client, **at).refusal()
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert said in details


async def test_a_token_of_a_server_with_another_key_is_refused(topics: Topics, tmp_path: Path) -> None:
    async with running_feed(topics, tmp_path / "one") as (_, target), stub(target) as client:
        token = (await Listener(client).begun()).token
    async with running_feed(topics, tmp_path / "two") as (_, target), stub(target) as client:
        code, details = await Listener(client, resume_token=token).refusal()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "issued by another server" in details


async def test_drain_gives_every_stream_its_token_and_ends_it_well(topics: Topics, tmp_path: Path) -> None:
    topics.records(envelope(0, 10))
    async with running_feed(topics, tmp_path, heartbeat_s=60) as (feed, target), stub(target) as client:
        listeners = [await Listener(client, earliest=True).begun() for _ in range(5)]
        for listener in listeners:
            await listener.records(10)
        drained = asyncio.create_task(feed.drain(10.0))
        for listener in listeners:
            assert await listener.end() is grpc.StatusCode.OK
            assert listener.drained
        await drained
    async with running_feed(topics, tmp_path) as (_, target), stub(target) as client:
        resumed = await Listener(client, resume_token=listeners[0].token).begun()
        topics.records(envelope(10, 1))
        assert await resumed.records(1) == [10]


async def test_more_subscribers_than_allowed_are_refused_and_a_place_that_gets_free_is_used(
    topics: Topics, tmp_path: Path
) -> None:
    async with running_feed(topics, tmp_path, subscribers_max=2) as (feed, target), stub(target) as client:
        first, _second = await Listener(client).begun(), await Listener(client).begun()
        code, details = await Listener(client).refusal()
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "feed.subscribers_max" in details
        first.call.cancel()
        await until(lambda: feed._subscribers == 1, "the place was given back")
        await Listener(client).begun()


async def test_when_the_log_is_made_anew_streams_end_instead_of_waiting_for_ever(
    own_kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    if own_kafka_broker.durable:
        pytest.skip("a restart of this broker keeps the log")
    topics = Topics(own_kafka_broker, partitions=1)
    topics.records(*(envelope(i, 1) for i in range(10)))
    async with running_feed(topics, tmp_path) as (_, target), stub(target) as client:
        listener = Listener(client, earliest=True)
        await listener.records(10)
        own_kafka_broker.restart()
        topics.make()
        topics.records(envelope(0, 1))
        topics.results(results(0, ["x"]))
        code, details = await listener.refusal()
        assert code is grpc.StatusCode.OUT_OF_RANGE, details
        assert "re-created" in details
        fresh = await Listener(client, earliest=True).begun()
        assert await fresh.records(1) == [0]
        code, _ = await Listener(client, resume_token=listener.token).refusal()
        assert code is grpc.StatusCode.OUT_OF_RANGE


async def test_an_entry_that_a_source_gives_again_is_passed_once(tmp_path: Path) -> None:
    config, telemetry = FeedConfig(), Telemetry("central", SILENT)
    hub = FeedHub(KafkaConfig(), config, telemetry)
    partition = ("records", 0)
    point = ResumePoint({partition: Position(1)})
    signer = TokenSigner(bytes(32))
    maker = Maker(config, LIMITS, telemetry)
    subscription = Subscription(hub, maker, signer, config, FeedFilter(feed_pb2.Filter()), point)
    entries = [Entry(feed_pb2.KIND_RECORDS, partition, i, 0, envelope(i)) for i in (0, 1, 2, 1, 2, 3, 0, 3, 4)]
    seen = [feed_pb2.FeedBatch.FromString(sent) async for sent in subscription._pass(entries)]
    assert [row.sequence for batch in seen for row in batch.records.records] == [1, 2, 3, 4]
    assert [signer.open(batch.resume_token).positions[partition].offset for batch in seen] == [2, 3, 4, 5]
