"""`sluice gateway`: what a person sees, and the whole process between real brokers."""
# ruff: noqa: F811 - a fixture that is imported has the name of the argument that asks for it

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway.app import run
from gateway.cli import gateway
from gateway.config import GatewayConfig
from gateway.local_config import AnalysisConfig, LocalConfig
from gateway.path_config import InboxConfig
from gateway.sealed import SealedReader
from sluice import codec
from sluice.codec import Limits
from sluice.connections import TelemetryConfig
from sluice.demo.loopback import free_port
from sluice.errors import ConfigError
from sluice.kafka import TopicsConfig
from tests.brokers.base import KafkaBroker, MqttBroker
from tests.brokers.clients import consume
from tests.brokers.fixtures import kafka_broker, mqtt_broker  # noqa: F401
from tests.gateway.site import SITE, WAIT_S, Device, gateway_config
from tests.sluice.examples import batch_of, texts


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(gateway, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_check_says_ok_and_what_would_run(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text('site = "plant-7"\n[mqtt]\nhost = "broker"\n')
    told = invoke("--config", str(file), "--check")
    assert told.splitlines()[0] == "ok"
    assert "site plant-7: MQTT at broker:1883" in told
    assert [path.name for path in tmp_path.iterdir()] == ["gateway.toml"], "a check leaves nothing behind"


@pytest.mark.parametrize(
    ("toml", "told"),
    [
        ("", "site"),
        ('site = "no spaces"', "not a valid name"),
        ('site = "s"\n[inbox]\nwindow_mesages_max = 1', "did you mean 'inbox.window_messages_max'"),
        ('site = "s"\n[policy]\nfile = "/nowhere/policy.toml"', "/nowhere/policy.toml"),
        ('site = "s"\n[scanner]\ndetectors = ["emial"]', "emial"),
        ('site = "s"\n[kafka.options]\nacks = "0"', "acks"),
    ],
)
def test_check_names_what_is_wrong(tmp_path: Path, toml: str, told: str) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text(toml)
    with pytest.raises(ConfigError, match=told):
        invoke("--config", str(file), "--check")


def test_a_policy_that_is_not_there_is_named_with_its_key(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text('site = "plant-7"\n[policy]\nfile = "gone.toml"\n')
    with pytest.raises(ConfigError, match=r"policy\.file: gone\.toml: No such file"):
        invoke("--config", str(file), "--check")


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"inbox\.packet_bytes_max"):
        GatewayConfig(site="s", inbox=InboxConfig(packet_bytes_max=1024))
    with pytest.raises(ConfigError, match=r"topics\.message_bytes_max"):
        GatewayConfig(site="s", topics=TopicsConfig(message_bytes_max=1024))


def test_the_command_imports_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "confluent_kafka", "pyarrow", "hyperscan", "grpc", "deltalake"]
    code = f"import sys, gateway.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


async def test_personal_data_is_sealed_and_the_rest_crosses(
    mqtt_broker: MqttBroker, kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    """The whole composition, without the model: real policy, real detectors, real sealed store."""
    local = LocalConfig(directory=str(tmp_path / "sealed"), key_create=True, analysis=AnalysisConfig(enabled=False))
    config = gateway_config(mqtt_broker.port, kafka_broker.bootstrap, tmp_path, local=local)
    stop = asyncio.Event()
    running = asyncio.create_task(run(config, stop=stop, handle_signals=False))
    sent = batch_of(*texts("all is well", "write to anna@corp.test", "pay 4111 1111 1111 1111", "bye"), site=SITE)
    async with Device(mqtt_broker.port) as device:
        await device.deliver([sent])
    stop.set()
    await asyncio.wait_for(running, WAIT_S)
    (message,) = await asyncio.to_thread(consume, kafka_broker.bootstrap, config.kafka.records_topic)
    arrived = codec.decode(message.value(), Limits())
    assert [m.text for m in arrived.messages()] == ["all is well", "bye"]
    sealed = [row for table in SealedReader(local).read_records() for row in table.to_pylist()]
    assert [(row["sequence"], row["text"]) for row in sealed] == [
        (1, "write to anna@corp.test"),
        (2, "pay 4111 1111 1111 1111"),
    ]


async def test_a_taken_port_is_named(mqtt_broker: MqttBroker, tmp_path: Path) -> None:
    local = LocalConfig(directory=str(tmp_path / "sealed"), key_create=True)
    telemetry = TelemetryConfig(port=mqtt_broker.port)
    config = gateway_config(mqtt_broker.port, "127.0.0.1:1", tmp_path, local=local, telemetry=telemetry)
    with pytest.raises(ConfigError, match=str(mqtt_broker.port)):
        await run(config, handle_signals=False)


def test_sigterm_ends_the_process_in_order_even_without_brokers(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text(
        f'site = "s"\ndrain_deadline_s = 2\n[kafka]\nbootstrap_servers = "127.0.0.1:{free_port()}"\n'
        f"[mqtt]\nport = {free_port()}\n"
        f'[local]\ndirectory = "{tmp_path}/sealed"\nkey_create = true\nanalysis.enabled = false\n'
        f'[quarantine]\ndirectory = "{tmp_path}/quarantine"\n'
    )
    command = [sys.executable, "-c", "from sluice.cli import main; main()", "gateway", "--config", str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        events: list[str] = []
        try:
            for line in process.stderr:
                events.append(json.loads(line)["event"])
                if events.count("kafka_away") and events.count("mqtt_connect_failed") and "SENT" not in events:
                    process.send_signal(signal.SIGTERM)
                    events.append("SENT")
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()
    assert "service_draining" in events
