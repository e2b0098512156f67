"""`sluice policy` and `sluice scan`: see what the gateway would decide, without a gateway."""

import base64
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from sluice.config import Section
from sluice.errors import ConfigError, Permanent

if TYPE_CHECKING:
    from gateway.batches import Decision
    from gateway.classifier import Classifier


class RecordLine(Section, frozen=True, kw_only=True):
    """One JSON line of `policy test`. Only `text` is usual; the rest has the value of an envelope that says nothing."""

    site: str = "site"
    device: str = "device"
    stream: str = "stream"
    sensitivity: str = "unspecified"
    event_time_us: int = 0
    text: str = ""
    metrics: dict[str, float] = msgspec.field(default_factory=dict)
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    payload: str = ""
    payload_base64: str = ""
    content_type: str = ""


@click.group()
def policy() -> None:
    """Checks and tries policies: which records may leave the site."""


@policy.command()
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Checks a policy FILE as the gateway would at its start, patterns included.

    Exit status 2 and one line naming the key when it is invalid.
    """
    from gateway.policy import warnings

    classifier = _classifier(file)
    rules = classifier.policy.file.rules
    for text in warnings(classifier.policy.file):
        click.echo(f"warning: {text}", err=True)
    detectors = sorted(classifier.scanner.names)
    click.echo(f"{file}: valid, {len(rules)} rules, classes: {', '.join(detectors)}")


@policy.command()
@click.argument("file", type=click.Path(path_type=Path))
def test(file: Path) -> None:
    """Decides records from stdin, one JSON object a line, by a policy FILE.

    Keys of a line, all optional: text, labels, metrics, payload (text) or payload_base64, content_type, site, device,
    stream, sensitivity (unspecified, public, internal, sensitive), event_time_us.

    Prints a JSON object for each: record (its number), route, rule (what decided), found, leaves (what would go to the
    cloud, or null).
    """
    classifier = _classifier(file)
    for number, line in _lines():
        if not line.strip():
            continue
        record = _parse(line, number)
        decision = _decide(classifier, record, number)
        answer = {
            "record": number,
            "route": decision.route.value,
            "rule": decision.rule,
            "found": list(decision.found),
            "leaves": _leaves(record) if decision.leaves else None,
        }
        click.echo(json.dumps(answer, ensure_ascii=False))


@click.command()
@click.option("--policy", "file", type=click.Path(path_type=Path), help="Use the [scanner] section of this policy.")
@click.option("--detectors", help="Comma-separated names; all when neither this nor --policy is given.")
def scan(file: Path | None, detectors: str | None) -> None:
    """Scans text lines from stdin and prints a JSON object for each.

    {"line": n, "found": [{"type", "start", "end"}]}; positions count characters, `end` is behind the last one.
    """
    from gateway.detectors import BY_NAME
    from gateway.scanner import Scanner, ScannerConfig

    if file is not None and detectors is not None:
        raise ConfigError("--policy and --detectors exclude each other")
    names = tuple(detectors.split(",")) if detectors is not None else tuple(BY_NAME)
    scanner = _classifier(file).scanner if file else Scanner(ScannerConfig(detectors=names))
    for number, line in _lines():
        found = [{"type": f.type, "start": f.start, "end": f.end} for f in scanner.find(line)]
        click.echo(json.dumps({"line": number, "found": found}))


def _classifier(file: Path) -> "Classifier":
    from gateway.classifier import build
    from gateway.policy import read

    try:
        return build(read(file))
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(str(file)) else f"{file}: {text}") from error


def _lines() -> Iterator[tuple[int, str]]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        yield number, line.decode(errors="replace").rstrip("\r\n")


def _parse(line: str, number: int) -> RecordLine:
    try:
        return msgspec.json.decode(line, type=RecordLine)
    except msgspec.MsgspecError as error:
        known = ", ".join(RecordLine.__struct_fields__)
        raise Permanent(f"line {number}: {error}; keys are {known}") from error


def _decide(classifier: "Classifier", line: RecordLine, number: int) -> "Decision":
    from sluice.record import SPOOL_ID_BYTES, Record, RecordBatch, Sensitivity, join_frames

    try:
        sensitivity = Sensitivity[line.sensitivity.upper()]
        payload = base64.b64decode(line.payload_base64, validate=True) if line.payload_base64 else line.payload.encode()
    except KeyError as error:
        known = ", ".join(s.name.lower() for s in Sensitivity)
        raise Permanent(f"line {number}: sensitivity {line.sensitivity!r} is not one of {known}") from error
    except ValueError as error:
        raise Permanent(f"line {number}: payload_base64: {error}") from error
    record = Record(line.event_time_us, line.text, line.metrics, line.labels, payload, line.content_type)
    batch = RecordBatch(
        device_id=line.device,
        spool_id=bytes(SPOOL_ID_BYTES),
        first_sequence=0,
        record_count=1,
        stream=line.stream,
        site=line.site,
        data=join_frames([record.to_message().SerializeToString()]),
        sensitivity=sensitivity,
    )
    return classifier.classify(batch).at(0)


def _leaves(line: RecordLine) -> dict[str, Any]:
    names = ("text", "metrics", "labels", "payload", "payload_base64", "content_type", "event_time_us")
    return {name: value for name in names if (value := getattr(line, name))}
