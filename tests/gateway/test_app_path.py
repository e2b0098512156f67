"""The record's path between real brokers: nothing lost, nothing twice, nothing out that should stay."""
# ruff: noqa: F811 - a fixture that is imported has the name of the argument that asks for it

import asyncio
import random
from pathlib import Path

import pytest

from gateway.batches import Decision, Verdict
from gateway.path_config import BridgeConfig, RoutingConfig
from protos import record_pb2
from sluice import codec
from sluice.errors import Permanent
from sluice.kafka import TopicsConfig
from sluice.record import Gap, GapReason, Record, RecordBatch, Route
from tests.brokers.base import KafkaBroker, MqttBroker
from tests.brokers.fixtures import (  # noqa: F401
    KafkaBehindProxy,
    kafka_behind_proxy,
    kafka_broker,
    mqtt_broker,
    mqtt_proxy,
)
from tests.brokers.proxy import FaultProxy
from tests.gateway.site import SECRET, SITE, Device, Store, gateway_config, running, small_limits, small_window, until
from tests.sluice.examples import batch_of, texts


def some(first: int, count: int = 10, word: str = "plain", **fields: object) -> RecordBatch:
    return batch_of(*texts(*(f"{word} {first + i}" for i in range(count))), first=first, site=SITE, **fields)


async def test_clean_records_reach_kafka_and_are_acknowledged(
    mqtt_broker: MqttBroker, kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    config = gateway_config(mqtt_broker.port, kafka_broker.bootstrap, tmp_path)
    async with running(config) as gateway, Device(mqtt_broker.port) as device:
        sent = [some(first) for first in range(0, 100, 10)]
        for batch in sent:
            await device.send(batch)
        for batch in sent:
            await device.settled(batch)
        arrived = await gateway.exported()
        assert [b.first_sequence for b in arrived] == [b.first_sequence for b in sent]
        assert [list(b.frames()) for b in arrived] == [list(b.frames()) for b in sent]
        assert all(b.received_time_us > 0 for b in arrived)
        (first, *_) = await gateway.kafka(config.kafka.records_topic)
        assert first.key() == b"device-1"
        assert dict(first.headers()) == {"site": b"site-1", "stream": b"host", "device": b"device-1"}
        assert gateway.store.batches == []
        assert device.ack_messages < 10, "settled ranges are told together"


async def test_what_stays_is_stored_and_declared(
    mqtt_broker: MqttBroker, kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    config = gateway_config(mqtt_broker.port, kafka_broker.bootstrap, tmp_path)
    async with running(config) as gateway, Device(mqtt_broker.port) as device:
        mixed = batch_of(*texts("a", f"{SECRET} b", "drop", "c"), gaps=(Gap(4, 2, GapReason.EXPIRED),), site=SITE)
        wholly = some(6, word=SECRET)
        for batch in (mixed, wholly):
            await device.send(batch)
            await device.settled(batch)
        first, receipt = await gateway.exported()
        assert [m.text for m in first.messages()] == ["a", "c"]
        assert first.gaps == (
            Gap(1, 1, GapReason.WITHHELD),
            Gap(2, 1, GapReason.DROPPED),
            Gap(4, 2, GapReason.EXPIRED),
        )
        assert receipt.data == b""
        assert receipt.gaps == (Gap(6, 10, GapReason.WITHHELD),)
        assert gateway.store.sequences == [1, *range(6, 16)]
        assert SECRET.encode() not in await gateway.bytes_outside()


async def test_an_unknown_field_does_not_cross(
    mqtt_broker: MqttBroker, kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    canary = b"canary-4111111111111111"
    unknown = b"\xfa\x01" + bytes([len(canary)]) + canary  # field 31, length-delimited
    record = record_pb2.Record(text="clean").SerializeToString() + unknown
    body = record_pb2.RecordFrames(records=[record]).SerializeToString() + unknown
    plain = codec.encode(batch_of(*texts("x"), site=SITE), codec.Compression.NONE)
    envelope = record_pb2.Envelope.FromString(plain.payload)
    envelope.batch = body
    envelope.checksum = codec.google_crc32c.value(body)
    envelope.header_checksum = codec.header_checksum(envelope)
    envelope.tracestate = canary.decode()
    payload = envelope.SerializeToString() + unknown
    assert payload.count(canary) == 4
    config = gateway_config(mqtt_broker.port, kafka_broker.bootstrap, tmp_path)
    async with running(config) as gateway, Device(mqtt_broker.port) as device:
        await device.send(payload)
        await device.settled(batch_of(*texts("x")))
        (arrived,) = await gateway.exported()
        assert [m.text for m in arrived.messages()] == ["clean"]
        assert canary not in await gateway.bytes_outside()
        assert canary.decode() not in gateway.log.getvalue()


async def test_resends_are_acknowledged_again_and_not_forwarded(
    mqtt_broker: MqttBroker, kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    config = gateway_config(mqtt_broker.port, kafka_broker.bootstrap, tmp_path)
    async with running(config) as gateway, Device(mqtt_broker.port) as device:
        batch = some(0)
        await device.send(batch)
        await device.settled(batch)
        device.acked.clear()
        await device.send(batch)
        await device.settled(batch)
        assert len(await gateway.exported()) == 1


async def test_a_device_keeps_its_order_while_others_overtake(
    mqtt_broker: MqttBroker, kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    """The first envelope of device a is slow to classify: a's later ones wait for it, b's do not."""
    release = asyncio.Event()
    loop = asyncio.get_running_loop()

    def classify(batch: RecordBatch) -> Verdict:
        if batch.device_id == "a" and batch.first_sequence == 0:
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result(20)
        return Verdict(Decision(Route.CLOUD, "all"))

    config = gateway_config(mqtt_broker.port, kafka_broker.bootstrap, tmp_path)
    async with (
        running(config, classify=classify) as gateway,
        Device(mqtt_broker.port, "a") as a,
        Device(mqtt_broker.port, "b") as b,
    ):
        of_a = [some(first, device_id="a") for first in range(0, 50, 10)]
        of_b = some(0, device_id="b")
        for batch in of_a:
            await a.send(batch)
        await b.send(of_b)
        await b.settled(of_b)
        assert a.acked == {}
        release.set()
        for batch in of_a:
            await a.settled(batch)
        assert [x.first_sequence for x in await gateway.exported() if x.device_id == "a"] == [0, 10, 20, 30, 40]


async def test_a_full_store_stops_acknowledging_and_never_bridges(
    mqtt_broker: MqttBroker, kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    store = Store()
    store.full = True
    config = gateway_config(mqtt_broker.port, kafka_broker.bootstrap, tmp_path)
    async with running(config, store=store) as gateway, Device(mqtt_broker.port) as device:
        sensitive, clean = batch_of(*texts("a", SECRET), site=SITE), some(2)
        await device.send(sensitive)
        await device.send(clean)
        await device.settled(clean)
        await until(lambda: gateway.events("envelope_nacked"), "the nack")
        assert not device.has_ack(sensitive)
        assert [b.first_sequence for b in await gateway.exported()] == [2]
        store.full = False
        await device.send(sensitive)
        await device.settled(sensitive)
        assert {b.first_sequence for b in await gateway.exported()} == {0, 2}


async def test_what_kafka_will_never_take_is_kept_on_the_site_and_declared(
    mqtt_broker: MqttBroker, kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    """An envelope within our limit, whose message with key and headers is beyond that of the topic."""
    limit = 64 * 1024
    noise = Record(event_time_us=1, payload=random.Random(1).randbytes(limit - 150))
    config = gateway_config(
        mqtt_broker.port,
        kafka_broker.bootstrap,
        tmp_path,
        limits=small_limits(envelope_bytes_max=limit),
        topics=TopicsConfig(partitions=1, replication_factor=1, message_bytes_max=limit),
    )
    async with running(config) as gateway, Device(mqtt_broker.port) as device:
        large = batch_of(noise, *texts(SECRET), site=SITE)
        assert len(codec.encode(large).payload) <= limit
        for batch in (large, some(2)):
            await device.send(batch)
            await device.settled(batch)
        assert {b.first_sequence: b.gaps for b in await gateway.exported()} == {
            0: (Gap(0, 1, GapReason.QUARANTINED), Gap(1, 1, GapReason.WITHHELD)),
            2: (),
        }
        (kept,) = gateway.quarantine
        assert codec.decode(kept.original, config.limits).data == large.data
        assert gateway.store.sequences == [1]


@pytest.mark.parametrize("failure", ["error", "timeout"])
async def test_a_classifier_that_fails_keeps_everything_on_the_site(
    mqtt_broker: MqttBroker, kafka_broker: KafkaBroker, tmp_path: Path, failure: str
) -> None:
    released = asyncio.Event()
    loop = asyncio.get_running_loop()

    def classify(batch: RecordBatch) -> Verdict:
        if failure == "timeout":
            asyncio.run_coroutine_threadsafe(released.wait(), loop).result(20)
        raise Permanent("a bug that quotes plain 0")

    config = gateway_config(
        mqtt_broker.port, kafka_broker.bootstrap, tmp_path, routing=RoutingConfig(threads=1, timeout_s=0.2)
    )
    async with running(config, classify=classify) as gateway, Device(mqtt_broker.port) as device:
        batches = [some(first) for first in range(0, 30, 10)]
        for batch in batches:
            await device.send(batch)
        for batch in batches:
            await device.settled(batch)
        released.set()
        assert gateway.store.sequences == list(range(30))
        assert b"plain" not in await gateway.bytes_outside()
        assert "plain" not in gateway.log.getvalue()
        assert gateway.events("classification_failed") == 3


async def test_nothing_is_lost_when_kafka_is_away_at_the_start_and_in_mid_flow(
    mqtt_broker: MqttBroker, kafka_behind_proxy: KafkaBehindProxy, tmp_path: Path
) -> None:
    broker, proxy = kafka_behind_proxy
    config = gateway_config(
        mqtt_broker.port,
        broker.bootstrap,
        tmp_path,
        inbox=small_window(),
        bridge=BridgeConfig(delivery_timeout_s=1.0),
    )
    proxy.refuse()
    batches = [some(first, word=SECRET if first % 20 else "plain") for first in range(0, 300, 10)]
    async with running(config) as gateway, Device(mqtt_broker.port) as device:
        for batch in batches[:10]:
            await device.send(batch)
        await until(lambda: gateway.events("kafka_away"), "it says that Kafka is away")
        assert gateway.telemetry.readiness() == {"mqtt": True, "kafka": False}
        assert device.acked == {}
        proxy.heal()
        await device.deliver(batches[:10])
        assert gateway.telemetry.readiness() == {"mqtt": True, "kafka": True}
        proxy.hang()
        for batch in batches[10:]:
            await device.send(batch)
        await until(lambda: gateway.events("kafka_write_retried"), "an expiry")
        proxy.heal()
        await device.deliver(batches)
        exported = await gateway.exported()
    found = {s for b in exported for s in b.sequences()} | set(gateway.store.sequences)
    assert found == set(range(300))
    declared = {s for b in exported for s in range(b.first_sequence, b.stop_sequence)}
    assert declared == set(range(300))


async def test_nothing_is_lost_when_the_mqtt_connection_breaks(
    mqtt_broker: MqttBroker, mqtt_proxy: FaultProxy, kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    """The gateway's connection is cut again and again; the device, as an agent does, resends what is not settled."""
    config = gateway_config(mqtt_proxy.port, kafka_broker.bootstrap, tmp_path, inbox=small_window())
    batches = [some(first) for first in range(0, 400, 10)]
    async with running(config) as gateway, Device(mqtt_broker.port) as device:
        for batch in batches:
            await device.send(batch)
            if batch.first_sequence % 100 == 50:
                mqtt_proxy.cut()
        await device.deliver(batches)
        exported = await gateway.exported()
    assert {s for b in exported for s in b.sequences()} == set(range(400))
    assert len(exported) == len(batches), "one process forwards each envelope once"


async def test_draining_settles_what_is_under_way(
    mqtt_broker: MqttBroker, kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    config = gateway_config(mqtt_broker.port, kafka_broker.bootstrap, tmp_path)
    async with Device(mqtt_broker.port) as device:
        async with running(config) as gateway:
            batches = [some(first) for first in range(0, 100, 10)]
            for batch in batches:
                await device.send(batch)
            await until(lambda: gateway.telemetry.registry.get_sample_value("sluice_inbox_records_total"), "some came")
            gateway.stop.set()
            await gateway.ended
            exported = {s for b in await gateway.exported() for s in b.sequences()}
            await until(lambda: {s for b in batches if device.has_ack(b) for s in b.sequences()} == exported, "acks")
        async with running(config) as gateway:
            # What the first one left unacknowledged, the broker or the device delivers to the next.
            for batch in batches:
                if not device.has_ack(batch):
                    await device.send(batch)
            for batch in batches:
                await device.settled(batch)
            assert {s for b in await gateway.exported() for s in b.sequences()} == set(range(100))


async def test_draining_without_kafka_ends_in_time_and_acknowledges_nothing(
    mqtt_broker: MqttBroker, kafka_behind_proxy: KafkaBehindProxy, tmp_path: Path
) -> None:
    broker, proxy = kafka_behind_proxy
    config = gateway_config(mqtt_broker.port, broker.bootstrap, tmp_path, drain_deadline_s=2.0)
    async with Device(mqtt_broker.port) as device:
        async with running(config) as gateway:
            await device.send(some(0))
            await device.settled(some(0))
            proxy.refuse()
            await device.send(some(10))
            await until(lambda: gateway.path.flow.in_flight, "under way")
            gateway.stop.set()
            await asyncio.wait_for(gateway.ended, 6)
        assert not device.has_ack(some(10))
        proxy.heal()
        async with running(config) as gateway:
            await device.send(some(10))
            await device.settled(some(10))
            assert {b.first_sequence for b in await gateway.exported()} == {0, 10}
