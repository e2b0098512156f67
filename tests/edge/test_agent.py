"""The agent over a real broker: durable when emit returns, settled only by the gateway, through every interruption."""

import asyncio
import contextlib
import io
import json
import threading
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from edge import Agent, Record
from edge.config import AgentConfig
from edge.records import RecordRefused
from sluice.acks import encode_ack
from sluice.config import load
from sluice.demo.loopback import free_port
from sluice.errors import Backpressure, ConfigError, Retryable
from sluice.telemetry import Telemetry
from tests.brokers.base import MqttBroker
from tests.brokers.proxy import FaultProxy
from tests.edge.gateway_double import TIMEOUT_S, GatewayDouble, until


def config_of(port: int, folder: Path, **sections: Any) -> AgentConfig:
    tree: dict[str, Any] = {
        "device_id": "d",
        "site": "s",
        "mqtt": {"port": port, "reconnect_delay_s_max": 0.3, "connect_timeout_s": 2.0},
        "spool": {"directory": str(folder), "ballast_bytes": 0},
        "batch": {"age_s_max": 0.05},
        "uplink": {"ack_timeout_s": 0.3, "ack_timeout_s_max": 0.3, "status_interval_s": 0.2},
        "drain_deadline_s": 5.0,
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section if isinstance(section, dict) else section
    return load(AgentConfig, environ={}, overrides=tree)


class Life:
    """One run of an agent on the test's loop."""

    def __init__(self, config: AgentConfig) -> None:
        self.log = io.StringIO()
        self.agent = Agent(config, Telemetry("edge", config.telemetry, stream=self.log))
        self.stop = asyncio.Event()

    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in self.log.getvalue().splitlines()]

    @contextlib.asynccontextmanager
    async def running(self, **options: Any) -> AsyncIterator["Life"]:
        self.task = asyncio.create_task(self.agent.run(stop=self.stop, handle_signals=False, **options))
        try:
            yield self
        finally:
            self.stop.set()
            async with asyncio.timeout(TIMEOUT_S):
                await self.task

    async def emit(self, *texts: str, stream: str = "x", **options: Any) -> None:
        records = [Record(event_time_us=1, text=text) for text in texts]
        await asyncio.to_thread(self.agent.emit, stream, records, **options)


async def test_what_is_emitted_arrives_and_leaves_the_spool_when_acknowledged(
    mqtt_broker: MqttBroker, tmp_path: Path
) -> None:
    gateway = GatewayDouble(mqtt_broker.port)
    async with gateway.running(), Life(config_of(mqtt_broker.port, tmp_path)).running() as life:
        await life.emit("a", "b")
        await life.emit("c")
        await until(lambda: life.agent.spool.empty)
        assert gateway.texts == ["a", "b", "c"]
        await until(lambda: any(s.next_sequence == 3 and s.spool_records == 0 for s in gateway.statuses))
    last = gateway.statuses[-1]
    assert (last.next_sequence, last.device_id, last.site) == (3, "d", "s")


async def test_the_last_status_is_offline_with_the_final_numbers(mqtt_broker: MqttBroker, tmp_path: Path) -> None:
    gateway = GatewayDouble(mqtt_broker.port)
    async with gateway.running():
        async with Life(config_of(mqtt_broker.port, tmp_path)).running() as life:
            await until(lambda: life.agent._uplink and life.agent._uplink.connected)
            await life.emit("a")
        await until(lambda: gateway.statuses and not gateway.statuses[-1].online)
        assert gateway.statuses[-1].next_sequence == 1
        assert gateway.statuses[-1].spool_records == 0


async def test_a_broker_that_took_it_is_not_enough(mqtt_broker: MqttBroker, tmp_path: Path) -> None:
    gateway = GatewayDouble(mqtt_broker.port)
    gateway.acking = False
    async with gateway.running():
        async with Life(config_of(mqtt_broker.port, tmp_path, drain_deadline_s=3.0)).running() as life:
            await life.emit("a", "b")
            # It is sent again until the gateway acknowledges.
            await until(lambda: len(gateway.batches) >= 3)
            assert life.agent.spool.depth.records == 2
            await until(lambda: gateway.statuses and gateway.statuses[-1].spool_records == 2)
            runs = gateway.statuses[-1].spool_ranges
            assert [(run.first, run.last) for run in runs] == [(0, 1)]
        # And kept through a restart.
        gateway.batches.clear()
        gateway.acking = True
        async with Life(config_of(mqtt_broker.port, tmp_path)).running() as life:
            await until(lambda: life.agent.spool.empty)
        assert gateway.texts == ["a", "b"]


async def test_work_goes_on_without_a_broker_and_catches_up(mqtt_broker: MqttBroker, tmp_path: Path) -> None:
    mqtt_broker.stop()
    async with Life(config_of(mqtt_broker.port, tmp_path)).running() as life:
        await life.emit("a")
        await until(lambda: "mqtt_connect_failed" in life.events())
        await life.emit("b")
        mqtt_broker.start()
        async with GatewayDouble(mqtt_broker.port).running() as gateway:
            await until(lambda: life.agent.spool.empty)
            assert gateway.texts == ["a", "b"]


async def test_a_broker_that_forgets_everything_loses_nothing(mqtt_broker: MqttBroker, tmp_path: Path) -> None:
    gateway = GatewayDouble(mqtt_broker.port)
    gateway.acking = False
    async with gateway.running(), Life(config_of(mqtt_broker.port, tmp_path)).running() as life:
        await life.emit("a")
        await until(lambda: gateway.batches)
        mqtt_broker.kill()
        mqtt_broker.wipe()
        await life.emit("b")
        gateway.acking = True
        mqtt_broker.start()
        await until(lambda: life.agent.spool.empty)
        assert gateway.texts == ["a", "b"]


async def test_a_connection_that_hangs_is_given_up_and_nothing_is_lost(
    mqtt_broker: MqttBroker, mqtt_proxy: FaultProxy, tmp_path: Path
) -> None:
    config = config_of(mqtt_proxy.port, tmp_path, mqtt={"keepalive_s": 1})
    async with GatewayDouble(mqtt_broker.port).running() as gateway, Life(config).running() as life:
        await life.emit("a")
        await until(lambda: gateway.texts == ["a"])
        mqtt_proxy.hang()
        await life.emit("b")
        await until(lambda: "mqtt_disconnected" in life.events())
        mqtt_proxy.heal()
        await until(lambda: life.agent.spool.empty)
        assert gateway.texts == ["a", "b"]


async def test_higher_priority_overtakes_a_backlog(mqtt_broker: MqttBroker, tmp_path: Path) -> None:
    gateway = GatewayDouble(mqtt_broker.port)
    config = config_of(mqtt_broker.port, tmp_path, uplink={"window_batches_max": 1, "ack_timeout_s": 30.0})
    mqtt_broker.stop()
    async with Life(config).running() as life:
        for n in range(5):
            await life.emit(f"old {n}", priority=1)
        await life.emit("alarm", priority=9)
        mqtt_broker.start()
        async with gateway.running():
            await until(lambda: life.agent.spool.empty)
    first = [batch.messages()[0].text for batch in gateway.batches]
    assert first.index("alarm") <= 1


async def test_senseless_acknowledgements_change_nothing(mqtt_broker: MqttBroker, tmp_path: Path) -> None:
    gateway = GatewayDouble(mqtt_broker.port)
    gateway.acking = False
    async with gateway.running(), Life(config_of(mqtt_broker.port, tmp_path, drain_deadline_s=1.0)).running() as life:
        await life.emit("a", "b")
        await until(lambda: gateway.batches)
        batch = gateway.batches[0]
        gateway.send_ack(batch, b"\xff\xff\xff")
        gateway.send_ack(batch, encode_ack(b"x" * 16, 99, []))
        gateway.send_ack(batch, encode_ack(batch.spool_id, 0, [(5, 1)]))
        await until(lambda: life.events().count("uplink_ack_ignored") >= 2)
        assert life.agent.spool.depth.records == 2
        # A cumulative one beyond the end settles what there is.
        gateway.send_ack(batch, encode_ack(batch.spool_id, 2**40, []))
        await until(lambda: life.agent.spool.empty)


async def test_a_full_spool_makes_emit_wait_and_go_on_after_an_acknowledgement(
    mqtt_broker: MqttBroker, tmp_path: Path
) -> None:
    import random

    noise = random.Random(1)
    gateway = GatewayDouble(mqtt_broker.port)
    gateway.acking = False
    config = config_of(mqtt_broker.port, tmp_path, spool={"bytes_max": 2 * 1024 * 1024})
    async with gateway.running(), Life(config).running() as life:

        async def emit() -> None:
            payload = noise.randbytes(200_000)
            await asyncio.to_thread(life.agent.emit, "x", Record(1, payload=payload), timeout_s=0.5)

        with contextlib.suppress(Backpressure, Retryable):
            async with asyncio.timeout(TIMEOUT_S):
                while True:
                    await emit()
        assert "spool_full" in life.events()
        gateway.acking = True
        gateway.acknowledge_all()
        await until(lambda: life.agent.spool.empty)
        await emit()
        await until(lambda: life.agent.spool.empty)
        assert len(gateway.arrived) == life.agent.spool.next_sequence


async def test_a_refused_record_refuses_its_whole_call(mqtt_broker: MqttBroker, tmp_path: Path) -> None:
    async with Life(config_of(mqtt_broker.port, tmp_path)).running() as life:
        with pytest.raises(RecordRefused, match="text_bytes_max"):
            await life.emit("fine", "x" * 70_000)
        assert life.agent.spool.next_sequence == 0


async def test_exit_when_drained_ends_by_itself(mqtt_broker: MqttBroker, tmp_path: Path) -> None:
    sources = [{"kind": "generator", "rate_per_s": 1e6, "count": 3000, "text_bytes": 50}]
    config = config_of(mqtt_broker.port, tmp_path, sources=sources)
    async with GatewayDouble(mqtt_broker.port).running() as gateway:
        life = Life(config)
        async with asyncio.timeout(TIMEOUT_S):
            await life.agent.run(handle_signals=False, exit_when_drained=True)
        assert gateway.record_count == 3000
        # A second run has nothing left to do.
        async with asyncio.timeout(TIMEOUT_S):
            await Life(config).agent.run(handle_signals=False, exit_when_drained=True)
        assert gateway.record_count == 3000


async def test_drain_stores_what_the_sources_had_delivered(mqtt_broker: MqttBroker, tmp_path: Path) -> None:
    sources = [{"kind": "generator", "rate_per_s": 2000}]
    config = config_of(mqtt_broker.port, tmp_path, sources=sources, batch={"age_s_max": 60.0})
    mqtt_broker.stop()
    life = Life(config)
    async with life.running():
        await until(lambda: life.agent._intake._pending_bytes > 20_000)
    ended = [json.loads(line) for line in life.log.getvalue().splitlines()][-1]
    assert ended["event"] == "agent_drained"
    assert ended["next_sequence"] > 100
    assert ended["spool_records"] == ended["next_sequence"]


def test_the_library_works_from_ordinary_threads(mqtt_broker: MqttBroker, tmp_path: Path) -> None:
    broker = f"mqtt://127.0.0.1:{mqtt_broker.port}"
    with Agent.connect(
        broker,
        device_id="d",
        site="s",
        spool=str(tmp_path / "spool"),
        drain_deadline_s=0.5,
        telemetry={"log_level": "error"},
    ) as agent:
        threads = [
            threading.Thread(target=lambda n=n: [agent.emit("x", Record(1, text=f"{n}.{i}")) for i in range(20)])
            for n in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert agent.spool.next_sequence == 100
        # 100 durable calls share their fsyncs.
        assert agent.spool.depth.items < 100
    with pytest.raises(Backpressure, match="stopping"):
        agent.emit("x", Record(1))


def test_an_agent_that_cannot_start_says_why(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = config_of(free_port(), tmp_path / "a", telemetry={"port": port, "log_level": "error"})
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"), Agent(config):
            pass
    config = config_of(free_port(), tmp_path / "b", telemetry={"log_level": "error"})
    with Agent(config), pytest.raises(ConfigError, match="in use by process"):
        Agent(config)


async def test_metrics_and_readiness_tell_the_truth(mqtt_broker: MqttBroker, tmp_path: Path) -> None:
    mqtt_broker.stop()
    async with Life(config_of(mqtt_broker.port, tmp_path, telemetry={"port": 0})).running() as life:
        await until(lambda: "agent_ready" in life.events())
        port = next(
            json.loads(line)["telemetry_port"] for line in life.log.getvalue().splitlines() if "agent_ready" in line
        )

        def get(path: str) -> tuple[int, str]:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode()

        assert (await asyncio.to_thread(get, "/healthz"))[0] == 200
        assert (await asyncio.to_thread(get, "/readyz")) == (503, "broker not ready\n")
        await life.emit("a", "b", stream="temp")
        _, metrics = await asyncio.to_thread(get, "/metrics")
        assert 'sluice_accepted_records_total{stream="temp"} 2.0' in metrics
        assert "sluice_spool_records 2.0" in metrics
        assert "sluice_uplink_connected_brokers 0.0" in metrics
        assert "process_resident_memory_bytes" in metrics
        mqtt_broker.start()
        async with GatewayDouble(mqtt_broker.port).running():
            await until(lambda: life.agent.spool.empty)
            assert (await asyncio.to_thread(get, "/readyz"))[0] == 200
            _, metrics = await asyncio.to_thread(get, "/metrics")
            assert "sluice_uplink_acked_records_total 2.0" in metrics


async def test_a_source_that_is_always_ready_leaves_the_loop_to_the_others(
    mqtt_broker: MqttBroker, tmp_path: Path
) -> None:
    # More than any machine makes, so the generator never waits.
    config = config_of(mqtt_broker.port, tmp_path, sources=[{"kind": "generator", "rate_per_s": 1e9}])
    async with GatewayDouble(mqtt_broker.port).running() as gateway:
        life = Life(config)
        async with life.running():
            await until(lambda: len(gateway.batches) > 20)
            await until(lambda: life.agent.spool.status().pending[0][0] > 0)
        assert life.events()[-1] == "agent_drained"
