"""`sluice sealed` shows on the site what stayed there, to whoever holds the key."""

import asyncio
import csv
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from gateway.sealed_cli import sealed
from sluice.errors import ConfigError
from tests.gateway.sealed_support import config, local_batch, open_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    async def fill() -> None:
        store = open_store(config(tmp_path))
        await store.write(local_batch(0, 3))
        await store.write(local_batch(0, 3))
        await store.write(local_batch(3, 2, device="fan-1", stream="audit", text="Ünïcode\x1b[31m"))
        results = {
            "device_id": ["pump-7"],
            "spool_id": [bytes(range(16)).hex()],
            "sequence": [1],
            "event_time": [1],
            "created_time": [2],
            "site": ["plant"],
            "stream": ["syslog"],
            "task": ["classify"],
            "model": ["m"],
            "model_version": ["1"],
            "label": ["network problem"],
            "score": [0.75],
            "novelty": [0.5],
            "token_count": [3],
            "truncated": [False],
            "error": [None],
        }
        await store.write_results(results)
        await store.drain(1)

    asyncio.run(fill())
    return tmp_path / "sealed"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(sealed, [str(a) for a in arguments])


def rows(result: Result) -> list[dict[str, object]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([], [0, 1, 2, 3, 4]),
        (["--device", "pump*"], [0, 1, 2]),
        (["--stream", "audit"], [3, 4]),
        (["--contains", "example.com 2"], [2]),
        (["--found", "email", "--device", "fan-1"], [3, 4]),
        (["--found", "phone"], []),
        (["--limit", "2"], [0, 1]),
        (["--since", "2025-10-09T08:53:21"], [0, 1, 2, 3, 4]),
        (["--since", "2025-10-09T08:53:22"], []),
        (["--until", "2025-10-09T08:53:21+00:00"], []),
    ],
)
def test_query_filters_and_shows_each_record_once(store: Path, filters: list[str], expected: list[int]) -> None:
    assert [row["sequence"] for row in rows(run("query", "--directory", store, "--json", *filters))] == expected


def test_query_prints_a_table_that_cannot_move_the_terminal(store: Path) -> None:
    output = run("query", "--directory", store).stdout
    assert output.splitlines()[0].split() == [
        "received_time",
        "device_id",
        "stream",
        "sequence",
        "rule",
        "found",
        "text",
    ]
    assert "Ünïcode" in output
    assert "\x1b" not in output


def test_query_shows_results_of_analysis(store: Path) -> None:
    (row,) = rows(run("query", "--directory", store, "--results", "--json", "--label", "network*"))
    assert (row["sequence"], row["label"], row["score"]) == (1, "network problem", 0.75)
    assert rows(run("query", "--directory", store, "--results", "--json", "--label", "hardware")) == []


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_export_writes_a_plain_file_for_its_owner_only(store: Path, tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"out.{suffix}"
    result = run("export", target, "--directory", store, "--device", "pump-7")
    assert result.exit_code == 0, result.output
    assert "3 rows, not encrypted" in result.output
    assert target.stat().st_mode & 0o777 == 0o600
    if suffix == "parquet":
        texts = pq.read_table(target).column("text").to_pylist()
    elif suffix == "csv":
        texts = [row["text"] for row in csv.DictReader(target.read_text(encoding="utf-8").splitlines())]
    else:
        texts = [json.loads(line)["text"] for line in target.read_text().splitlines()]
    assert texts == [f"call bob@example.com {i}" for i in range(3)]
    assert isinstance(run("export", target, "--directory", store).exception, ConfigError)
    assert run("export", target, "--directory", store, "--force").exit_code == 0


def test_info_counts_what_is_sealed(store: Path) -> None:
    (answer,) = rows(run("info", "--directory", store, "--json"))
    records = answer["records"]
    assert isinstance(records, dict)
    assert (records["rows"], records["distinct"], records["files"]) == (8, 5, 3)
    assert (answer["analyzed_to"], answer["published_to"]) == (None, None)


def test_a_store_that_is_not_there_or_not_named_is_an_error(tmp_path: Path) -> None:
    assert "no sealed store in" in str(run("info", "--directory", tmp_path).exception)
    assert "--config" in str(run("info").exception)


def test_the_gateway_s_own_configuration_names_the_store(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(f"site = 'plant'\n[local]\ndirectory = '{store}'\n")
    assert len(rows(run("query", "--config", path, "--json"))) == 5


def test_the_commands_load_no_heavy_library_before_they_are_used() -> None:
    heavy = "{'pyarrow', 'hyperscan', 'cryptography', 'torch', 'confluent_kafka', 'stdnum'}"
    modules = "gateway.policy_cli, gateway.sealed_cli, gateway.policy, gateway.scanner, gateway.local_config"
    code = f"import {modules}, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
