"""Bad input, end to end: kept on the site, declared without its content, and nothing gets stuck behind it."""
# ruff: noqa: F811 - a fixture that is imported has the name of the argument that asks for it

import stat
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import zstandard

from gateway.path_config import QuarantineConfig
from protos import record_pb2
from sluice import codec
from sluice.codec import Compression
from sluice.record import Gap, GapReason, Record
from tests.brokers.base import KafkaBroker, MqttBroker
from tests.brokers.fixtures import kafka_broker, mqtt_broker  # noqa: F401
from tests.gateway.site import SITE, Device, gateway_config, running, small_limits, until
from tests.sluice.examples import batch_of, texts

CANARY = "canary-4111111111111111"
GOOD = batch_of(*texts("good"), first=1000, site=SITE)


class Case(NamedTuple):
    """`make` gets the device that sends it."""

    reason: str
    settles: bool
    make: Callable[[str], bytes]


def two(device: str, *records: Record, compression: Compression = Compression.NONE) -> bytes:
    """An envelope of two records."""
    batch = batch_of(*(records or texts(CANARY, CANARY)), site=SITE, device_id=device)
    return codec.encode(batch, compression).payload


def altered(
    device: str, body: bytes | None = None, compression: int = record_pb2.COMPRESSION_NONE, **fields: object
) -> bytes:
    """An envelope of two records that hold the canary, with some of it replaced."""
    message = record_pb2.Envelope.FromString(two(device))
    if body is not None:
        message.batch = body
        message.checksum = google_crc32c.value(body)
        message.compression = compression
    for name, value in fields.items():
        setattr(message, name, value)
    message.header_checksum = codec.header_checksum(message)
    return message.SerializeToString()


BOMB = zstandard.ZstdCompressor().compress(bytes(8 << 20))
TOO_MANY = record_pb2.RecordFrames(records=[b""] * 10_000).SerializeToString()
LARGE = Record(event_time_us=1, payload=CANARY.encode() * 10_000)
MANY_KEYS = Record(event_time_us=1, metrics={f"{CANARY}-{i}": 1.0 for i in range(300)})
LONG = Record(event_time_us=1, text=CANARY * 1000)
ZSTD = record_pb2.COMPRESSION_ZSTD

CASES = {
    "undecodable": Case("undecodable", False, lambda _: b"\xff" + CANARY.encode()),
    "records-undecodable": Case("undecodable", True, lambda device: altered(device, b"\xff" + CANARY.encode())),
    "checksum": Case("checksum", True, lambda device: altered(device, checksum=1)),
    "oversize": Case("envelope_bytes", True, lambda device: two(device, LARGE, LARGE)),
    "bomb": Case("decompressed_bytes", True, lambda device: altered(device, BOMB, ZSTD)),
    "not-zstd": Case("compression", True, lambda device: altered(device, CANARY.encode(), ZSTD)),
    "too-many-records": Case("record_count", True, lambda device: altered(device, TOO_MANY)),
    "bad-stream": Case("header", False, lambda device: altered(device, stream=f"{CANARY} has spaces")),
    "many-keys": Case("keys_per_map", True, lambda device: two(device, MANY_KEYS, Record(1))),
    "long-text": Case("text_bytes", True, lambda device: two(device, LONG, Record(1), compression=Compression.ZSTD)),
    "another-device": Case("device_name", False, lambda _: altered("device-2")),
    "another-site": Case("header", False, lambda device: altered(device, site="site-2")),
}
CLAIMED = batch_of(*texts("", ""), site=SITE)


async def test_bad_input_is_kept_on_the_site_and_declared_without_its_content(
    mqtt_broker: MqttBroker, kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    """Every case at once, each from a device of its own, between good envelopes of another."""
    limits = small_limits(text_bytes_max=10_000)
    config = gateway_config(mqtt_broker.port, kafka_broker.bootstrap, tmp_path, limits=limits)
    payloads = {device: case.make(device) for device, case in CASES.items()}
    async with running(config) as gateway, Device(mqtt_broker.port) as device, AsyncExitStack() as stack:
        others = {name: await stack.enter_async_context(Device(mqtt_broker.port, name)) for name in CASES}
        for name, other in others.items():
            await other.send(payloads[name])
        await device.send(GOOD)
        await device.settled(GOOD)
        await until(lambda: len(gateway.quarantine) == len(CASES), "the originals on the site")
        for name, case in CASES.items():
            if case.settles:
                await others[name].settled(CLAIMED)
        await until(lambda: not gateway.path.inbox.held, "dealt with")
        kept = {q.device_id: q for q in gateway.quarantine}
        notices = {n.device_id: n for n in await gateway.notices()}
        exported = {b.device_id: b for b in await gateway.exported()}
        assert kept.keys() == notices.keys() == CASES.keys()
        assert exported.keys() == {"device-1", *(name for name, case in CASES.items() if case.settles)}
        for name, case in CASES.items():
            assert others[name].has_ack(CLAIMED) == case.settles, name
            assert (kept[name].reason, kept[name].original) == (case.reason, payloads[name]), name
            assert kept[name].detail, name
            told = notices[name]
            assert (told.reason, told.site, told.original, told.detail) == (case.reason, SITE, b"", ""), name
            assert told.original_bytes == len(payloads[name]), name
            assert told.record_count == (2 if case.settles else 0), name
            if case.settles:
                assert exported[name].gaps == (Gap(0, 2, GapReason.QUARANTINED),), name
        assert CANARY.encode() not in await gateway.bytes_outside()
        assert CANARY not in gateway.log.getvalue()


async def test_more_positions_than_the_limit_are_settled_as_quarantined(
    mqtt_broker: MqttBroker, kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    """A device whose limit is higher than ours must not send the same envelope for ever."""
    limits = small_limits(records_per_batch_max=3)
    config = gateway_config(mqtt_broker.port, kafka_broker.bootstrap, tmp_path, limits=limits)
    large = batch_of(*texts(CANARY, "b", "c", "d", "e"), site=SITE)
    async with running(config) as gateway, Device(mqtt_broker.port) as device:
        await device.send(large)
        await device.settled(large)
        (message,) = await gateway.kafka(config.kafka.records_topic)
        assert codec.decode(message.value(), codec.Limits()).gaps == (Gap(0, 5, GapReason.QUARANTINED),)
        assert [(n.reason, n.record_count) for n in await gateway.notices()] == [("record_count", 5)]
        assert len(gateway.quarantine) == 1


async def test_originals_are_readable_by_us_alone(
    mqtt_broker: MqttBroker, kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    config = gateway_config(mqtt_broker.port, kafka_broker.bootstrap, tmp_path)
    async with running(config) as gateway, Device(mqtt_broker.port) as device:
        await device.send(b"\xff")
        await until(lambda: gateway.quarantine, "the original")
    assert modes(Path(config.quarantine.directory)) == [0o700, 0o600]


async def test_the_same_bad_bytes_are_announced_once(
    mqtt_broker: MqttBroker, kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    config = gateway_config(mqtt_broker.port, kafka_broker.bootstrap, tmp_path)
    async with running(config) as gateway, Device(mqtt_broker.port) as device:
        for _ in range(5):
            await device.send(b"\xff nonsense")
            await device.send(altered("device-1", checksum=1))
        await device.settled(CLAIMED)
        await device.send(GOOD)
        await device.settled(GOOD)
        await until(lambda: not gateway.path.inbox.held, "dealt with")
        assert len(gateway.quarantine) == 2
        assert len(await gateway.notices()) == 2
        assert len(await gateway.exported()) == 2


async def test_a_full_quarantine_still_declares_and_says_that_it_keeps_nothing(
    mqtt_broker: MqttBroker, kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    quarantine = QuarantineConfig(directory=str(tmp_path / "q"), files_max=1)
    config = gateway_config(mqtt_broker.port, kafka_broker.bootstrap, tmp_path, quarantine=quarantine)
    async with running(config) as gateway, Device(mqtt_broker.port) as device:
        await device.send(b"\xff first")
        await until(lambda: gateway.quarantine, "the first original")
        await device.send(altered("device-1", checksum=1))
        await device.settled(CLAIMED)
        assert len(gateway.quarantine) == 1
        assert gateway.events("quarantine_not_kept") == 1
        assert {n.reason for n in await gateway.notices()} == {"undecodable", "checksum"}
        (receipt,) = await gateway.exported()
        # Nothing is in quarantine, so nothing may be called so.
        assert {gap.reason for gap in receipt.gaps} == {GapReason.DROPPED}


async def test_a_cloned_device_is_noticed_and_its_records_are_not_mixed_in(
    mqtt_broker: MqttBroker, kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    config = gateway_config(mqtt_broker.port, kafka_broker.bootstrap, tmp_path)
    async with running(config) as gateway, Device(mqtt_broker.port) as device:
        original = batch_of(*texts("mine"), site=SITE)
        await device.send(original)
        await device.settled(original)
        device.acked.clear()
        await device.send(batch_of(*texts("the clone's"), site=SITE))
        await until(lambda: gateway.quarantine, "the clone's envelope")
        await device.send(GOOD)
        await device.settled(GOOD)
        assert not device.acked[GOOD.spool_id].covers(1, 1000), "only what is settled is acknowledged"
        assert gateway.events("spool_identity_reused") == 1
        assert [n.reason for n in await gateway.notices()] == ["identity_reused"]
        assert [m.text for b in await gateway.exported() for m in b.messages()] == ["mine", "good"]


async def test_a_topic_that_names_no_device_is_refused(
    mqtt_broker: MqttBroker, kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    config = gateway_config(mqtt_broker.port, kafka_broker.bootstrap, tmp_path)
    async with running(config) as gateway, Device(mqtt_broker.port) as device:
        await device.send(batch_of(*texts("x"), site=SITE), device=f"{CANARY} *")
        await device.send(GOOD)
        await device.settled(GOOD)
        await until(lambda: gateway.quarantine, "the original")
        await until(lambda: not gateway.path.inbox.held, "dealt with")
        (notice,) = await gateway.notices()
        assert (notice.reason, notice.device_id) == ("device_name", "")
        assert CANARY.encode() not in await gateway.bytes_outside()


def modes(folder: Path) -> list[int]:
    return [stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())]
