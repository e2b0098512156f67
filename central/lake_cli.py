"""`sluice ledger` and `sluice lake`: whether the books balance, and looking after the tables."""

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from central.lake.config import LakeConfig
from sluice.errors import Permanent, Retryable

if TYPE_CHECKING:
    from central.lake.store import DeltaStore
    from sluice.ledger import Ledger

_LOOK_AGAIN_S = 0.5
_COLUMNS = ("accepted", "in_lake", "kept_on_site", "quarantined", "expired", "dropped", "in_spool", "unexplained")
_HINT = (
    "Records on their way through Kafka count as unexplained until the lake has committed them: "
    "look again with --wait SECONDS."
)


def _lake_option(function: Any) -> Any:
    return click.option(
        "--lake",
        "uri",
        required=True,
        envvar="SLUICE_LAKE__URI",
        show_envvar=True,
        metavar="URI",
        help="Directory of the lake, or s3://bucket/prefix.",
    )(function)


@click.command()
@_lake_option
@click.option("--device", help="Only this device.")
@click.option("--wait", "wait_s", default=0.0, metavar="SECONDS", help="Look again until it balances, for so long.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def ledger(uri: str, device: str | None, wait_s: float, as_json: bool) -> None:
    """Shows what became of every record that the devices accepted.

    Exit status: 0 when the books balance, 1 when they do not.
    """
    books = _balance(uri, device, wait_s)
    click.echo(json.dumps(books.as_dict()) if as_json else _table(books))
    if not books.balanced:
        if not as_json:
            click.echo(_HINT, err=True)
        sys.exit(1)


@click.group()
def lake() -> None:
    """Looks after the lake's tables."""


@lake.command()
@_lake_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def describe(uri: str, as_json: bool) -> None:
    """Shows tables, versions, files, rows, bytes, partitions, and how far each Kafka partition was read."""
    from central.lake import maintenance

    found = maintenance.describe(_open(uri))
    if as_json:
        click.echo(json.dumps({table.name: table.as_dict() for table in found}))
        return
    header = ("table", "version", "files", "rows", "bytes", "partitions")
    click.echo(_align([header, *((t.name, t.version, t.files, t.rows, t.bytes, t.partitions) for t in found)]))
    for table in found:
        for app, offset in table.offsets.items():
            click.echo(f"{table.name}: {app} is read up to offset {offset}")


@lake.command()
@_lake_option
@click.option("--target-mib", default=256, show_default=True, type=click.IntRange(1), help="Aimed-at size of a file.")
def compact(uri: str, target_mib: int) -> None:
    """Joins small files. The old ones stay until `vacuum`."""
    from central.lake import maintenance

    for table, (before, after) in maintenance.compact(_open(uri), target_mib << 20).items():
        click.echo(f"{table}: {before} files became {after}")


@lake.command()
@_lake_option
@click.option(
    "--older-than-h",
    default=24,
    show_default=True,
    type=click.IntRange(0),
    help="Hours since a file was written. 0 is safe only while nothing writes or reads.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
def vacuum(uri: str, older_than_h: int, dry_run: bool) -> None:
    """Removes files that no table names any more, and what a crash left behind."""
    from central.lake import maintenance

    for table, paths in maintenance.vacuum(_open(uri), older_than_h, dry_run=dry_run).items():
        click.echo(f"{table}: {len(paths)} files {'would go' if dry_run else 'removed'}")


@lake.command()
@_lake_option
def verify(uri: str) -> None:
    """Checks that every file the tables name is there and whole, and that no row is there twice.

    Exit status: 1 when something is wrong.
    """
    from central.books import read_ledger
    from central.lake import maintenance

    opened = _open(uri)
    problems = maintenance.verify(opened)
    for account in read_ledger(opened).accounts if not problems else ():
        if account.duplicate_rows:
            spool = f"{account.device_id} {account.spool_id.hex()}"
            problems.append(f"records: {account.duplicate_rows} duplicate rows of {spool}")
    for problem in problems:
        click.echo(problem)
    click.echo(f"{len(problems)} problems" if problems else "All files are there and whole; no row is there twice.")
    sys.exit(1 if problems else 0)


def _open(uri: str) -> "DeltaStore":
    from central.lake.store import open_lake

    return open_lake(LakeConfig(uri=uri))


def _balance(uri: str, device: str | None, wait_s: float) -> "Ledger":
    from central.books import read_ledger

    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            books = read_ledger(_open(uri), device)
            if books.balanced or time.monotonic() >= deadline_s:
                return books
        except (Retryable, Permanent):
            # No lake yet, or files that were vacuumed while they were read.
            if time.monotonic() >= deadline_s:
                raise
        time.sleep(min(_LOOK_AGAIN_S, max(0.0, deadline_s - time.monotonic())))


def _table(books: "Ledger") -> str:
    if not books.accounts:
        return "Nothing has been accepted yet."
    lines: list[tuple[Any, ...]] = [("device", "spool", *_COLUMNS, "duplicates", "balanced")]
    for account in books.accounts:
        values = account.as_dict()
        counts = [values[column] for column in _COLUMNS]
        balanced = "yes" if account.balanced else "NO"
        lines.append((account.device_id, account.spool_id.hex()[:8], *counts, account.duplicate_rows, balanced))
    total = books.as_dict()
    counts = [total[column] for column in _COLUMNS]
    lines.append(("total", "", *counts, total["duplicate_rows"], "yes" if books.balanced else "NO"))
    return _align(lines)


def _align(lines: list[tuple[Any, ...]]) -> str:
    """Columns padded to the widest; numbers to the right."""
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(lines[0]))]

    def cell(value: Any, width: int) -> str:
        return f"{value:>{width}}" if isinstance(value, int) else f"{value:<{width}}"

    return "\n".join("  ".join(cell(v, w) for v, w in zip(line, widths, strict=True)).rstrip() for line in lines)
