"""`sluice spool`: for the engineer on site. It only reads, and may be used while the agent runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click


@click.group()
def spool() -> None:
    """Looks into an agent's spool."""


@spool.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def inspect(directory: Path, as_json: bool) -> None:
    """Says what is in a spool: identity, depth, the sources' places."""
    from sluice.spool_reader import SpoolReader

    with SpoolReader(directory) as reader:
        report = reader.summary()
    if as_json:
        click.echo(json.dumps(report))
        return
    for key, value in report.items():
        click.echo(f"{key:<18} {value}")


@spool.command()
@click.argument("directory", type=click.Path(path_type=Path))
def verify(directory: Path) -> None:
    """Reads every item and checks it; ends with 1 when anything is damaged."""
    from sluice.spool_reader import SpoolReader

    with SpoolReader(directory) as reader:
        problems = 0
        for problem in reader.problems():
            click.echo(problem)
            problems += 1
        items = reader.summary()["items"] if not problems else "?"
    if problems:
        click.echo(f"damaged: {problems} findings; the agent repairs it at its next start and declares what is lost")
        raise SystemExit(1)
    click.echo(f"ok: {items} items")


@spool.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--limit", type=click.IntRange(min=1), help="At most so many records.")
def export(directory: Path, limit: int | None) -> None:
    """Prints the unsettled records, one JSON object a line. They may be sensitive."""
    from itertools import islice

    from sluice.spool_reader import SpoolReader

    with SpoolReader(directory) as reader:
        for line in islice(_lines(reader.payloads()), limit):
            click.echo(json.dumps(line, ensure_ascii=False))


def _lines(payloads: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    from sluice.codec import Limits, decode
    from sluice.record import Record

    # Whatever limits the agent had when it wrote them.
    limits = Limits(envelope_bytes_max=2**31, decompressed_bytes_max=2**31, records_per_batch_max=2**31)
    for payload in payloads:
        batch = decode(payload, limits)
        identity = {"device_id": batch.device_id, "spool_id": batch.spool_id.hex(), "stream": batch.stream}
        for gap in batch.gaps:
            run = {"first_sequence": gap.first_sequence, "count": gap.count, "gap": gap.reason.name}
            yield identity | run
        for sequence, message in zip(batch.sequences(), batch.messages(), strict=True):
            record = Record.from_message(message)
            fields: dict[str, Any] = {
                "sequence": sequence,
                "event_time_us": record.event_time_us,
                "text": record.text,
                "metrics": dict(record.metrics),
                "labels": dict(record.labels),
                "payload": record.payload.hex(),
                "content_type": record.content_type,
            }
            yield identity | {key: value for key, value in fields.items() if value or key == "sequence"}
