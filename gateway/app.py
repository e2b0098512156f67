"""The gateway's composition: which parts there are, and how a record's path leads through them.

    inbox -> judge (policy, scanner) -> router -> (local | bridge)

`RecordPath` is that path; `run` adds what decides and what keeps: policy, sealed store, on-site analysis.
The services drain in the order of the path: sources first, the writer to Kafka last.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.batches import LocalBatch, Verdict
from gateway.bridge import Bridge
from gateway.config import GatewayConfig
from gateway.flow import Flow
from gateway.inbox import Inbox
from gateway.judge import Judge
from gateway.quarantine import Quarantine, QuarantineStore
from gateway.status import StatusRelay
from sluice.delivery import Sink
from sluice.kafka import KafkaWriter
from sluice.record import RecordBatch
from sluice.service import Service, serve
from sluice.telemetry import Telemetry

if TYPE_CHECKING:
    from gateway.sealed import SealedStore


@dataclass(frozen=True)
class RecordPath:
    """The services that a record passes."""

    inbox: Inbox
    status: StatusRelay
    flow: Flow
    writer: KafkaWriter

    def sources(self) -> list[Service]:
        """In the order of draining, without the writer."""
        return [self.inbox, self.status, self.flow]


def kafka_writer(config: GatewayConfig, telemetry: Telemetry) -> KafkaWriter:
    """The one way from the site to Kafka."""
    return KafkaWriter(
        config.kafka,
        telemetry,
        client_id=f"sluice-gateway-{config.site}",
        topics=config.topics,
        queue_bytes_max=config.bridge.queue_bytes_max,
        delivery_timeout_s=config.bridge.delivery_timeout_s,
        message_bytes_max=config.topics.message_bytes_max,
    )


def record_path(
    config: GatewayConfig,
    telemetry: Telemetry,
    writer: KafkaWriter,
    classify: Callable[[RecordBatch], Verdict],
    local: Sink[LocalBatch],
) -> RecordPath:
    """Wires the path up. Call it on the event loop that will run it.

    Args:
        config: of the gateway.
        telemetry: of the process.
        writer: to Kafka.
        classify: decides a batch; blocks, is called in threads.
        local: makes durable on the site what stays.

    Raises:
        ConfigError: when the quarantine's directory cannot be used.
    """
    bridge = Bridge(writer, config.kafka.records_topic, config.bridge, telemetry)
    store = QuarantineStore(config.quarantine)
    quarantine = Quarantine(config.quarantine, store, writer, config.kafka.quarantine_topic, bridge, telemetry)
    inbox = Inbox(config.inbox, config.mqtt, config.limits, config.site, telemetry, quarantine.take)
    judge = Judge(classify, config.routing, telemetry)
    status = StatusRelay(
        config.status,
        config.mqtt,
        f"{inbox.client_id}-status",
        config.site,
        writer,
        config.kafka.status_topic,
        telemetry,
    )
    telemetry.ready_when("mqtt", lambda: inbox.connected and status.connected)
    telemetry.ready_when("kafka", lambda: writer.reachable)
    flow = Flow(inbox.deliveries(), judge, local, bridge, quarantine.take)
    return RecordPath(inbox, status, flow, writer)


async def run(
    config: GatewayConfig,
    *,
    stop: asyncio.Event | None = None,
    handle_signals: bool = True,
    read_again: Callable[[], GatewayConfig] | None = None,
) -> None:
    """Runs a gateway until SIGTERM, SIGINT or `stop`.

    Raises:
        ConfigError: a port is taken, a directory cannot be used, the policy is invalid, the sealed store has no key.
        Exception: the first error of a service, after the others were drained.
    """
    telemetry = Telemetry("gateway", config.telemetry)
    started = asyncio.Event()
    telemetry.ready_when("started", started.is_set)
    telemetry.listen()
    writer = kafka_writer(config, telemetry)
    try:
        await serve(
            compose(config, telemetry, writer, read_again),
            telemetry,
            drain_deadline_s=config.drain_deadline_s,
            stop=stop,
            handle_signals=handle_signals,
            on_ready=started.set,
        )
    finally:
        await writer.close(0.0)
        telemetry.close()


def compose(
    config: GatewayConfig,
    telemetry: Telemetry,
    writer: KafkaWriter,
    read_again: Callable[[], GatewayConfig] | None = None,
) -> list[Service]:
    """All services of a gateway, in the order of draining."""
    from gateway.live_policy import LivePolicy
    from gateway.local import LocalSink
    from gateway.sealed import SealedStore

    policy = LivePolicy(config.policy, config.scanner, telemetry)
    store = SealedStore(config.local, telemetry)
    telemetry.ready_when("local", lambda: not store.full)
    path = record_path(config, telemetry, writer, policy.classify, LocalSink(store))
    analysis = site_analysis(config, telemetry, store, writer, read_again) if config.local.analysis.enabled else []
    return [*path.sources(), policy, *analysis, store, writer]


def site_analysis(
    config: GatewayConfig,
    telemetry: Telemetry,
    store: "SealedStore",
    writer: KafkaWriter,
    read_again: Callable[[], GatewayConfig] | None,
) -> Sequence[Service]:
    """What follows the sealed store: the engine's opinion of its texts, and what of that may leave."""
    from engine.reload import ModelReload
    from engine.service import Engine
    from gateway.analysis import ResultPublisher, SiteAnalysis
    from gateway.site_engine import SiteEngine

    settings = config.local.analysis
    engine = Engine(config.engine, telemetry)
    analysis = SiteAnalysis(store, engine, settings, telemetry)
    publisher = ResultPublisher(store, settings, writer.write, config.kafka.results_topic, telemetry)
    reload = [ModelReload(engine, lambda: read_again().engine, telemetry)] if read_again is not None else []
    return [*reload, SiteEngine(engine, analysis, telemetry), publisher]
