"""A site for tests: a device, a store, a gateway of real parts between real brokers."""

import asyncio
import io
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from confluent_kafka import Message as KafkaMessage

from gateway.app import RecordPath, kafka_writer, record_path
from gateway.batches import Decision, LocalBatch, Verdict
from gateway.config import GatewayConfig
from gateway.path_config import InboxConfig, QuarantineConfig
from protos import control_pb2, record_pb2
from sluice import codec, topics
from sluice.codec import Limits
from sluice.connections import KafkaConfig, MqttConfig, TelemetryConfig
from sluice.errors import Backpressure
from sluice.intervals import IntervalSet
from sluice.kafka import TopicsConfig
from sluice.mqtt import Message, MqttSession
from sluice.record import RecordBatch, Route
from sluice.service import serve
from sluice.telemetry import Telemetry
from tests.brokers.clients import consume

SITE = "site-1"
WAIT_S = 20.0
SECRET = "secret"


async def until(check: Callable[[], Any], what: str) -> Any:
    """The first true value of `check`; `what` says in the error what was waited for."""
    try:
        async with asyncio.timeout(WAIT_S):
            while not (value := check()):  # noqa: ASYNC110 - what is waited for is the state of other processes
                await asyncio.sleep(0.01)
            return value
    except TimeoutError:
        raise AssertionError(f"not within {WAIT_S} s: {what}") from None


def by_text(batch: RecordBatch) -> Verdict:
    """A record whose text says so stays; one that says drop is dropped."""
    stays, drops = Decision(Route.LOCAL, "says so", (SECRET,)), Decision(Route.DROP, "says so")
    exceptions = {}
    for index, record in enumerate(batch.messages()):
        if SECRET in record.text:
            exceptions[index] = stays
        elif "drop" in record.text:
            exceptions[index] = drops
    return Verdict(Decision(Route.CLOUD, "rest"), exceptions)


class Store:
    """A site's store in memory; refuses while `full`."""

    def __init__(self) -> None:
        self.batches: list[LocalBatch] = []
        self.full = False
        self.refused = 0

    async def write(self, batch: LocalBatch) -> None:
        if self.full:
            self.refused += 1
            raise Backpressure("full", retry_after_s=1.0)
        self.batches.append(batch)

    @property
    def sequences(self) -> list[int]:
        return sorted(s for batch in self.batches for s in batch.sequences)

    @property
    def frames(self) -> bytes:
        return b"".join(frame for batch in self.batches for frame in batch.frames)


class Device:
    """Publishes envelopes as an agent does, and collects acknowledgements."""

    def __init__(self, port: int, name: str = "device-1", site: str = SITE) -> None:
        self.name = name
        self.site = site
        self.acked: dict[bytes, IntervalSet] = {}
        self.ack_messages = 0
        self._session = MqttSession(
            MqttConfig(port=port, reconnect_delay_s_max=0.3),
            client_id=f"test-{name}-{uuid.uuid4().hex[:6]}",
            telemetry=Telemetry("device", stream=io.StringIO()),
            subscriptions=[topics.topic(site, name, topics.ACK)],
            on_message=self._acknowledged,
        )
        self._running: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._running = asyncio.create_task(self._session.run())
        await asyncio.wait_for(self._session.wait_connected(), WAIT_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._running is not None
        await self._session.stop()
        await self._running

    async def send(self, batch: RecordBatch | bytes, channel: str = topics.UP, device: str | None = None) -> None:
        payload = codec.encode(batch).payload if isinstance(batch, RecordBatch) else batch
        await self._session.publish(topics.topic(self.site, device or self.name, channel), payload)

    async def settled(self, batch: RecordBatch) -> None:
        """Returns when the whole batch was acknowledged."""
        first, stop = batch.first_sequence, batch.stop_sequence
        await until(lambda: self.has_ack(batch), f"acknowledgement of [{first}, {stop}) of {self.name}")

    async def deliver(self, batches: Sequence[RecordBatch]) -> None:
        """Sends as an agent does: again and again, less and less often, until all is acknowledged."""
        pause_s = 0.2
        async with asyncio.timeout(3 * WAIT_S):
            while waiting := [batch for batch in batches if not self.has_ack(batch)]:
                for batch in waiting:
                    await self.send(batch)
                await asyncio.sleep(pause_s)
                pause_s *= 1.5

    def has_ack(self, batch: RecordBatch) -> bool:
        known = self.acked.get(batch.spool_id)
        return known is not None and known.covers(batch.first_sequence, batch.stop_sequence)

    def _acknowledged(self, message: Message) -> None:
        told = control_pb2.Ack.FromString(message.payload)
        known = self.acked.setdefault(told.spool_id, IntervalSet())
        self.ack_messages += 1
        known.add(0, told.cumulative_sequence)
        for run in told.ranges:
            known.add(run.first, run.last + 1)


@dataclass
class Gateway:
    """A running gateway and what can be seen of it."""

    config: GatewayConfig
    path: RecordPath
    telemetry: Telemetry
    log: io.StringIO
    stop: asyncio.Event
    store: Store
    ended: asyncio.Task[None] = field(repr=False)

    def events(self, name: str) -> int:
        return self.log.getvalue().count(f'"event": "{name}"')

    async def kafka(self, topic: str) -> list[KafkaMessage]:
        """All messages of a topic."""

        def read() -> list[KafkaMessage]:
            count = self.config.topics.partitions
            return [m for p in range(count) for m in consume(self.config.kafka.bootstrap_servers, topic, p)]

        return await asyncio.to_thread(read)

    async def exported(self) -> list[RecordBatch]:
        """What is in the records topic, decoded."""
        return [codec.decode(m.value(), self.config.limits) for m in await self.kafka(self.config.kafka.records_topic)]

    async def notices(self) -> list[record_pb2.Quarantined]:
        messages = await self.kafka(self.config.kafka.quarantine_topic)
        return [record_pb2.Quarantined.FromString(m.value()) for m in messages]

    async def bytes_outside(self) -> bytes:
        """Everything that ever left the site: values, keys and headers of all topics."""
        names = self.config.kafka
        out = []
        for topic in (names.records_topic, names.quarantine_topic, names.status_topic, names.results_topic):
            for message in await self.kafka(topic):
                out += [message.value() or b"", message.key() or b"", repr(message.headers()).encode()]
                if topic == names.records_topic:
                    out.append(codec.decode(message.value(), self.config.limits).data)
        return b"\n".join(out)

    @property
    def quarantine(self) -> list[record_pb2.Quarantined]:
        files = sorted(Path(self.config.quarantine.directory).glob("*.quarantined.pb"))
        return [record_pb2.Quarantined.FromString(file.read_bytes()) for file in files]


def gateway_config(mqtt_port: int, bootstrap: str, folder: Path, **sections: Any) -> GatewayConfig:
    """A configuration with topics of its own."""
    run = uuid.uuid4().hex[:8]
    names = {f"{kind}_topic": f"{kind}.{run}" for kind in ("records", "results", "quarantine", "status")}
    defaults = {
        "site": SITE,
        "mqtt": MqttConfig(port=mqtt_port, reconnect_delay_s_max=0.3),
        "kafka": KafkaConfig(bootstrap_servers=bootstrap, **names),
        "topics": TopicsConfig(partitions=1, replication_factor=1),
        "quarantine": QuarantineConfig(directory=str(folder / "quarantine")),
        "drain_deadline_s": 5.0,
    }
    return GatewayConfig(**(defaults | sections))


@asynccontextmanager
async def running(
    config: GatewayConfig,
    *,
    classify: Callable[[RecordBatch], Verdict] = by_text,
    store: Store | None = None,
    wait_connected: bool = True,
) -> AsyncIterator[Gateway]:
    """A gateway's record path with a classifier and a store of the test's; drained at the end."""
    log = io.StringIO()
    telemetry = Telemetry("gateway", TelemetryConfig(log_level="debug"), log)
    store = store or Store()
    writer = kafka_writer(config, telemetry)
    path = record_path(config, telemetry, writer, classify, store)
    stop = asyncio.Event()
    services = [*path.sources(), writer]
    ended = asyncio.create_task(
        serve(services, telemetry, drain_deadline_s=config.drain_deadline_s, stop=stop, handle_signals=False)
    )
    gateway = Gateway(config, path, telemetry, log, stop, store, ended)
    try:
        if wait_connected:
            await until(lambda: path.inbox.connected and path.status.connected, "connected to MQTT")
        yield gateway
    finally:
        stop.set()
        await asyncio.wait_for(ended, WAIT_S)


def small_window(**settings: Any) -> InboxConfig:
    return InboxConfig(window_messages_max=4, held_messages_max=6, **settings)


def small_limits(**settings: Any) -> Limits:
    return Limits(**({"envelope_bytes_max": 64 * 1024, "decompressed_bytes_max": 256 * 1024} | settings))
