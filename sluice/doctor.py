"""`sluice doctor`: whether this machine can do what is asked of it, and what to do about it where it cannot.

The checks of the machine are in `doctor_machine`; here are configurations, the brokers that they name, and the report.
"""

import json
import os
import sys
import time
import tomllib
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import click

from sluice.doctor_machine import (
    Finding,
    Findings,
    Verdict,
    check_cpu,
    check_disk,
    check_extras,
    check_gpu,
    check_port,
    check_python,
    is_installed,
)
from sluice.errors import SluiceError

_CONNECT_TIMEOUT_S: Final = 3.0


@click.command()
@click.option(
    "--config",
    "configs",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Check this file (of agent, gateway or central) and what it names; repeatable.",
)
@click.option("--mqtt", metavar="HOST:PORT", multiple=True, help="Whether an MQTT 5 broker answers there.")
@click.option("--kafka", metavar="HOST:PORT", multiple=True, help="Whether Kafka answers there.")
@click.option("--port", "ports", multiple=True, type=int, help="Whether this port is free on 127.0.0.1.")
@click.option("--spool", "folder", type=click.Path(path_type=Path), help="Measure the disk here.  [this folder]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(
    configs: tuple[Path, ...],
    mqtt: tuple[str, ...],
    kafka: tuple[str, ...],
    ports: tuple[int, ...],
    folder: Path | None,
    as_json: bool,
) -> None:
    """Checks what is installed, which brokers answer, whether there is a GPU, and how fast the disk is.

    Exit status: 0 when nothing failed, 1 when something did.
    """
    findings = list(examine(configs, mqtt=mqtt, kafka=kafka, ports=ports, folder=folder))
    failed = any(finding.verdict is Verdict.FAIL for finding in findings)
    click.echo(as_json_text(findings) if as_json else as_text(findings))
    sys.exit(1 if failed else 0)


def examine(
    configs: tuple[Path, ...] = (),
    *,
    mqtt: tuple[str, ...] = (),
    kafka: tuple[str, ...] = (),
    ports: tuple[int, ...] = (),
    folder: Path | None = None,
) -> Findings:
    """All checks, the general ones first."""
    yield from check_python()
    yield from check_extras()
    yield from check_cpu()
    yield from check_gpu()
    yield from check_disk(folder or Path())
    for path in configs:
        yield from check_config(path)
    for address in mqtt:
        yield from check_address(address, "mqtt", check_mqtt)
    for address in kafka:
        yield from check_address(address, "kafka", check_kafka)
    for port in ports:
        yield check_port("127.0.0.1", port, "--port")


def as_text(findings: list[Finding]) -> str:
    """For a person."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict.value:<4}  {finding.check:<22} {finding.detail}")
        if finding.way_out:
            lines.append(f"{'':<4}  {'':<22} -> {finding.way_out}")
    counts = {verdict: sum(f.verdict is verdict for f in findings) for verdict in Verdict}
    lines.append(", ".join(f"{count} {verdict.value}" for verdict, count in counts.items()))
    return "\n".join(lines)


def as_json_text(findings: list[Finding]) -> str:
    """One JSON object."""
    rows = [{**f._asdict(), "verdict": f.verdict.value} for f in findings]
    return json.dumps({"ok": all(f.verdict is not Verdict.FAIL for f in findings), "findings": rows})


# --- configurations


def check_config(path: Path) -> Findings:
    """Whether the file is valid for its part, and whether the brokers, ports and folders that it names are there."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        yield Finding(f"config {path.name}", Verdict.FAIL, f"{path}: {error}", "fix the file")
        return
    part = part_of(tree)
    try:
        _check_with_part(part, path)
    except (SluiceError, click.ClickException) as error:
        yield Finding(f"config {path.name}", Verdict.FAIL, str(error), "fix the key that it names")
        return
    yield Finding(f"config {path.name}", Verdict.OK, f"valid for `sluice {part}`")
    yield from _check_named(part, tree)


def part_of(tree: Mapping[str, Any]) -> str:
    """Which part a configuration is for, by its keys."""
    if "device_id" in tree or "sources" in tree or "spool" in tree:
        return "edge"
    return "gateway" if "site" in tree or "mqtt" in tree else "central"


def _check_with_part(part: str, path: Path) -> None:
    """Runs `sluice PART --config FILE --check` in this process, silently."""
    found = tuple(metadata.entry_points(group="sluice.commands", name=part))
    if not found:
        raise click.ClickException(f"`sluice {part}` is not installed")
    command: click.Command = found[0].load()
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, _redirected(nowhere):
        command.main(["--config", str(path), "--check"], standalone_mode=False)


def _check_named(part: str, tree: Mapping[str, Any]) -> Findings:
    mqtt = tree.get("mqtt", {})
    if part in {"edge", "gateway"}:
        if mqtt.get("ca_file"):
            yield Finding("mqtt", Verdict.OK, "not tried: it needs TLS, which `doctor` does not speak")
        else:
            yield from check_mqtt(mqtt.get("host", "127.0.0.1"), mqtt.get("port", 1883))
    if part in {"gateway", "central"}:
        servers = tree.get("kafka", {}).get("bootstrap_servers", "127.0.0.1:9092")
        for address in servers.split(","):
            yield from check_address(address, "kafka", check_kafka)
    telemetry = tree.get("telemetry", {})
    if telemetry.get("port"):
        yield check_port(telemetry.get("host", "127.0.0.1"), telemetry["port"], "telemetry.port")
    if part == "central":
        feed = tree.get("feed", {})
        yield check_port(feed.get("host", "127.0.0.1"), feed.get("port", 7443), "feed.port")
    if part == "edge":
        yield from check_disk(Path(tree.get("spool", {}).get("directory", "spool")))


# --- brokers


def check_address(address: str, name: str, check: Callable[[str, int], Findings]) -> Findings:
    """Splits host:port and checks what is there."""
    host, _, port = address.strip().rpartition(":")
    if not host or not port.isdecimal():
        yield Finding(name, Verdict.FAIL, f"{address!r} is not HOST:PORT", "such as broker.example.com:1883")
        return
    yield from check(host.strip("[]"), int(port))


def check_mqtt(host: str, port: int) -> Findings:
    """Whether an MQTT 5 broker answers a CONNECT."""
    import paho.mqtt.client as paho
    from paho.mqtt.enums import CallbackAPIVersion

    answers: list[str] = []
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id=f"sluice-doctor-{os.getpid()}", protocol=paho.MQTTv5)
    client.on_connect = lambda _client, _data, _flags, reason, _properties: answers.append(str(reason))
    client.connect_timeout = _CONNECT_TIMEOUT_S
    where = f"{host}:{port}"
    try:
        client.connect(host, port)
        deadline_s = time.monotonic() + _CONNECT_TIMEOUT_S
        while not answers and time.monotonic() < deadline_s:
            client.loop(timeout=0.1)
        client.disconnect()
    except (OSError, ValueError) as error:
        yield Finding("mqtt", Verdict.FAIL, f"{where}: {error}", "is the broker running, and the port right?")
        return
    if not answers:
        yield Finding("mqtt", Verdict.FAIL, f"{where}: connected, but no MQTT 5 answer", "is it an MQTT 5 broker?")
    elif answers[0] == "Success":
        yield Finding("mqtt", Verdict.OK, f"{where} speaks MQTT 5")
    else:
        # It answers; that it wants credentials, which we do not have here, is its right.
        yield Finding("mqtt", Verdict.WARN, f"{where} answers: {answers[0]}", "set mqtt.username and password_file")


def check_kafka(host: str, port: int) -> Findings:
    """Whether Kafka answers a metadata request, and which of our topics are there."""
    where = f"{host}:{port}"
    if not is_installed("confluent_kafka"):
        way_out = "pip install 'sluice-stream[gateway]'"
        yield Finding("kafka", Verdict.FAIL, f"{where}: the client is not installed", way_out)
        return
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    try:
        found = AdminClient({"bootstrap.servers": where, "log_level": 0}).list_topics(timeout=_CONNECT_TIMEOUT_S)
    except KafkaException as error:
        yield Finding(
            "kafka", Verdict.FAIL, f"{where}: {error}", "is it running, and are its advertised listeners right?"
        )
        return
    ours = {name: len(topic.partitions) for name, topic in found.topics.items() if name.startswith("sluice.")}
    listed = ", ".join(f"{name} ({count} partitions)" for name, count in sorted(ours.items()))
    detail = listed or "no topic of ours yet: gateway and central make them"
    yield Finding("kafka", Verdict.OK, f"{where}, {len(found.brokers)} brokers; {detail}")


class _redirected:  # noqa: N801 - used like a function
    """Both output streams into a file, for a command that prints."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> None:
        self._before = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = self._file

    def __exit__(self, *_: object) -> None:
        sys.stdout, sys.stderr = self._before
