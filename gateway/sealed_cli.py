"""`sluice sealed`: what stayed on the site, read on the site by whoever holds the key."""

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from sluice.errors import ConfigError, Permanent

if TYPE_CHECKING:
    from gateway.local_config import LocalConfig

_WIDTH_MAX: Final = 72
_RECORD_VIEW: Final = ("received_time", "device_id", "stream", "sequence", "rule", "found", "text")
_RESULT_VIEW: Final = ("created_time", "device_id", "stream", "sequence", "label", "score", "novelty")
_F = TypeVar("_F", bound=Callable[..., Any])


@click.group()
def sealed() -> None:
    """Reads the sealed store: records that stayed on the site. Needs the key file."""


def _store_options(command: _F) -> _F:
    for option in (
        click.option("--key-file", type=click.Path(path_type=Path), help="Key; default: as configured."),
        click.option("--directory", type=click.Path(path_type=Path), help="The store; default: as configured."),
        click.option("--config", type=click.Path(path_type=Path), envvar="SLUICE_CONFIG", help="The gateway's file."),
    ):
        command = option(command)
    return command


def _filter_options(command: _F) -> _F:
    for option in (
        click.option("--results", is_flag=True, help="Results of on-site analysis instead of records."),
        click.option("--contains", help="Text that the record's text contains."),
        click.option("--found", help="Class that was found, such as payment_card."),
        click.option("--label", help="Glob of the result's label (with --results)."),
        click.option("--until", help="Received (analysed) before; ISO 8601, UTC unless it says otherwise."),
        click.option("--since", help="Received (analysed) at or after; ISO 8601."),
        click.option("--stream", default="*", help="Glob."),
        click.option("--device", default="*", help="Glob."),
    ):
        command = option(command)
    return command


@sealed.command()
@_store_options
@_filter_options
@click.option("--limit", default=50, type=click.IntRange(min=0), help="Rows at most; 0: all.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, all columns.")
def query(
    config: Path | None, directory: Path | None, key_file: Path | None, limit: int, as_json: bool, **filters: Any
) -> None:
    """Prints sealed records (or results), oldest first."""
    view = _RESULT_VIEW if filters["results"] else _RECORD_VIEW
    rows = _rows(_local_config(config, directory, key_file), filters)
    shown: list[Mapping[str, Any]] = []
    for number, row in enumerate(rows):
        if limit and number >= limit:
            click.echo(f"... more; --limit {limit}", err=True)
            break
        if as_json:
            click.echo(json.dumps(_plain(row), ensure_ascii=False))
        else:
            shown.append(row)
    if not as_json:
        _print_table(view, shown)


@sealed.command()
@click.argument("target", type=click.Path(path_type=Path))
@_store_options
@_filter_options
@click.option("--force", is_flag=True, help="Replace the file when it exists.")
def export(
    target: Path, config: Path | None, directory: Path | None, key_file: Path | None, force: bool, **filters: Any
) -> None:
    """Writes sealed records (or results) to TARGET, NOT encrypted, mode 0600: .jsonl, .csv or .parquet."""
    writers: dict[str, Callable[[Path, Iterator[Mapping[str, Any]]], int]] = {
        ".jsonl": _write_jsonl,
        ".csv": _write_csv,
        ".parquet": _write_parquet,
    }
    if target.suffix not in writers:
        raise ConfigError(f"{target}: the name must end with one of {', '.join(writers)}")
    if target.exists() and not force:
        raise ConfigError(f"{target} exists; --force replaces it")
    rows = _rows(_local_config(config, directory, key_file), filters)
    part = target.with_suffix(target.suffix + ".part")
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
    count = writers[target.suffix](part, rows)
    part.replace(target)
    click.echo(f"{target}: {count} rows, not encrypted", err=True)


@sealed.command()
@_store_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def info(config: Path | None, directory: Path | None, key_file: Path | None, as_json: bool) -> None:
    """Prints how much is sealed, of which time, and how far analysis got."""
    from gateway.sealed import PLACES, SealedReader
    from gateway.sealed_table import saved_position

    local = _local_config(config, directory, key_file)
    reader = SealedReader(local)
    answer: dict[str, Any] = {"directory": local.directory, "bytes_max": local.bytes_max}
    for name, table in (("records", reader.records), ("results", reader.results)):
        files = table.files()
        answer[name] = {
            "rows": sum(f.rows for f in files),
            "files": len(files),
            "bytes": sum(f.size_bytes for f in files),
            "oldest": _iso_ms(files[0].oldest_ms) if files else None,
            "newest": _iso_ms(files[-1].newest_ms) if files else None,
        }
    distinct = sum(rows.num_rows for rows in reader.read_records(["sequence"]))
    answer["records"]["distinct"] = distinct
    answer["analyzed_to"], answer["published_to"] = (
        _iso_ms(at) if (at := saved_position(Path(local.directory) / name)) >= 0 else None for name in PLACES
    )
    if as_json:
        click.echo(json.dumps(answer))
        return
    for key, value in answer.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        click.echo(f"{key:14} {text}")


def _local_config(config: Path | None, directory: Path | None, key_file: Path | None) -> "LocalConfig":
    import msgspec

    from gateway.local_config import LocalConfig

    local = LocalConfig()
    if config is not None:
        from gateway.config import GatewayConfig
        from sluice.config import load

        local = load(GatewayConfig, config).local
    elif directory is None:
        raise ConfigError("which store? give --config with the gateway's file, or --directory (and --key-file)")
    if directory is not None:
        local = msgspec.structs.replace(local, directory=str(directory))
    return msgspec.structs.replace(local, key_file=str(key_file)) if key_file is not None else local


def _rows(local: "LocalConfig", filters: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    from gateway.sealed import SealedReader

    reader = SealedReader(local)
    since, until = _moment(filters["since"], "--since"), _moment(filters["until"], "--until")
    since_ms = int(since.timestamp() * 1000) if since else 0
    tables = reader.read_results(since_ms=since_ms) if filters["results"] else reader.read_records(since_ms=since_ms)
    time_column = "created_time" if filters["results"] else "received_time"
    for table in tables:
        for row in table.to_pylist():
            moment = row[time_column]
            if (since and moment < since) or (until and moment >= until):
                continue
            if _matches(row, filters):
                yield row


def _matches(row: Mapping[str, Any], filters: Mapping[str, Any]) -> bool:
    globs = {"device_id": filters["device"], "stream": filters["stream"]}
    if filters["label"]:
        globs["label"] = filters["label"]
    if not all(fnmatchcase(row.get(name, ""), glob) for name, glob in globs.items()):
        return False
    if filters["found"] and filters["found"] not in row.get("found", ()):
        return False
    return not filters["contains"] or filters["contains"] in row.get("text", "")


def _moment(text: str | None, option: str) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text!r} is no ISO 8601 time such as 2026-01-31T12:00:00") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON types."""
    plain: dict[str, Any] = {n: v.isoformat() if isinstance(v, datetime) else v for n, v in row.items()}
    for name in ("metrics", "labels"):
        if name in plain:
            plain[name] = dict(plain[name])
    if "payload" in plain:
        plain["payload"] = plain["payload"].hex()
    return plain


def _print_table(view: tuple[str, ...], rows: list[Mapping[str, Any]]) -> None:
    cells = [list(view), *([_cell(row[name]) for name in view] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(view))]
    for line in cells:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, datetime):
        text = value.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    elif isinstance(value, list):
        text = ",".join(map(str, value))
    else:
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
    # Control characters of a log line must not reach the terminal.
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= _WIDTH_MAX else text[: _WIDTH_MAX - 1] + "…"


def _write_jsonl(path: Path, rows: Iterator[Mapping[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(_plain(row), ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_csv(path: Path, rows: Iterator[Mapping[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        for row in rows:
            plain = _plain(row)
            if not count:
                writer.writerow(plain)
            writer.writerow(json.dumps(v) if isinstance(v, dict | list) else v for v in plain.values())
            count += 1
    return count


def _write_parquet(path: Path, rows: Iterator[Mapping[str, Any]]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from gateway.sealed_schema import RECORDS, RESULTS

    listed = list(rows)
    if not listed:
        path.unlink()
        raise Permanent("nothing to export")
    schema = (RESULTS if "label" in listed[0] else RECORDS).schema()
    pq.write_table(pa.Table.from_pylist(listed, schema=schema), path, compression="zstd")
    return len(listed)


def _iso_ms(moment_ms: int) -> str:
    return datetime.fromtimestamp(moment_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
