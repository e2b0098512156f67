"""The bridge takes what may leave, and says so only when Kafka has it."""
# ruff: noqa: F811 - a fixture that is imported has the name of the argument that asks for it

import ast
import asyncio
import inspect
import io

import gateway.analysis
import gateway.local
import gateway.sealed
from gateway.batches import ExportBatch
from gateway.bridge import Bridge
from gateway.path_config import BridgeConfig
from sluice import codec
from sluice.codec import Limits
from sluice.connections import KafkaConfig
from sluice.kafka import KafkaWriter
from sluice.record import GapReason
from sluice.telemetry import Telemetry
from tests.brokers.base import KafkaBroker
from tests.brokers.clients import consume
from tests.brokers.fixtures import KafkaBehindProxy, kafka_behind_proxy, kafka_broker  # noqa: F401
from tests.gateway.site import WAIT_S, until
from tests.sluice.examples import batch_of, texts


def bridge_to(bootstrap: str, topic: str) -> tuple[Bridge, KafkaWriter, Telemetry]:
    telemetry = Telemetry("test", stream=io.StringIO())
    writer = KafkaWriter(KafkaConfig(bootstrap_servers=bootstrap), telemetry, client_id="test")
    return Bridge(writer, topic, BridgeConfig(), telemetry), writer, telemetry


async def test_what_is_exported_arrives_whole(kafka_broker: KafkaBroker) -> None:
    topic = kafka_broker.create_topic()
    bridge, writer, telemetry = bridge_to(kafka_broker.bootstrap, topic)
    small, large = batch_of(*texts("a", "b")), batch_of(*texts(*("x" * 500 for _ in range(200))), first=2)
    for batch in (small, large):
        await bridge.write(ExportBatch.of(batch, {GapReason.WITHHELD: [batch.first_sequence]}))
    await writer.close(WAIT_S)
    arrived = [codec.decode(m.value(), Limits()) for m in consume(kafka_broker.bootstrap, topic)]
    assert [list(b.frames()) for b in arrived] == [list(b.frames())[1:] for b in (small, large)]
    assert telemetry.registry.get_sample_value("sluice_bridge_records_total") == 200
    assert telemetry.registry.get_sample_value("sluice_bridge_gap_records_total") == 2


async def test_a_write_is_not_over_before_kafka_has_it(kafka_behind_proxy: KafkaBehindProxy) -> None:
    broker, proxy = kafka_behind_proxy
    topic = broker.create_topic()
    bridge, writer, _ = bridge_to(broker.bootstrap, topic)
    await until(lambda: writer.reachable, "reachable")
    proxy.hang()
    queued = asyncio.Event()
    write = asyncio.create_task(bridge.write(ExportBatch.of(batch_of(*texts("a")), {}), on_queued=queued.set))
    await asyncio.wait_for(queued.wait(), WAIT_S)
    assert not write.done()
    proxy.heal()
    await asyncio.wait_for(write, WAIT_S)
    await writer.close(WAIT_S)
    assert len(consume(broker.bootstrap, topic)) == 1


def test_what_stays_on_the_site_knows_no_bridge() -> None:
    for module in (gateway.local, gateway.sealed, gateway.analysis):
        tree = ast.parse(inspect.getsource(module))
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert "gateway.bridge" not in imported
