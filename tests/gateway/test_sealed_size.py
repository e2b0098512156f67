"""The sealed store knows its own size, and what it took it can give back."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.sealed import SealedReader
from sluice.record import Record
from tests.gateway.sealed_support import DAY_MS, Clock, Log, config, local_batch, open_store


async def test_the_size_is_right_when_records_and_results_are_committed_together(tmp_path: Path) -> None:
    store = open_store(config(tmp_path))
    rows = result_rows(20)
    await asyncio.gather(*(store.write(local_batch(i, 1)) for i in range(20)), store.write_results(rows))
    for i in range(20, 30):
        await asyncio.gather(store.write(local_batch(i, 1)), store.write_results(rows), store.maintain())
    files = [p.stat().st_size for p in (tmp_path / "sealed").rglob("*.parquet")]
    assert store.size_bytes == sum(files)
    await store.drain(1)


@pytest.mark.parametrize("event_time_us", [2**63 - 1, -(2**63), 253_402_300_800_000_000, -62_135_596_800_000_001])
async def test_a_time_outside_the_calendar_can_be_read_again(tmp_path: Path, event_time_us: int) -> None:
    settings = config(tmp_path)
    store = open_store(settings)
    batch = local_batch(0, 1)
    frame = Record(event_time_us, text="call bob@example.com").to_message().SerializeToString()
    await store.write(replace(batch, frames=(frame,)))
    await store.drain(1)
    (row,) = next(SealedReader(settings).read_records()).to_pylist()
    assert row["event_time"] == row["received_time"]


def result_rows(count: int) -> dict[str, list[object]]:
    """Columns of results for `write_results`."""
    row: dict[str, object] = {
        "device_id": "pump-7",
        "spool_id": "00" * 16,
        "event_time": 0,
        "created_time": 0,
        "site": "plant",
        "stream": "syslog",
        "task": "classify",
        "model": "m",
        "model_version": "1",
        "label": "ok",
        "score": 0.5,
        "novelty": 0.0,
        "token_count": 3,
        "truncated": False,
        "error": None,
    }
    return {"sequence": list(range(count)), **{name: [value] * count for name, value in row.items()}}


async def test_a_damaged_file_stops_neither_merging_beside_it_nor_the_retention_of_results(tmp_path: Path) -> None:
    clock = Clock()
    log = Log()
    store = open_store(config(tmp_path, merge_files=2, retention_days=1.0), log, clock)
    await store.write_results(result_rows(3))
    clock.now_ms += 2 * DAY_MS
    for i in range(5):
        await store.write(local_batch(i, 1))
    files = store.records.files()
    damaged = store.directory / "records" / files[2].name
    damaged.write_bytes(b"PARE" + b"x" * 200 + b"PARE")
    await store.maintain()
    await store.maintain()
    assert store.results.files() == [], "expired"
    assert [file.rows for file in store.records.files()] == [2, 1, 2]
    assert damaged.exists(), "nobody deletes what may be repaired"
    assert log.events().count("sealed_maintenance_failed") == 1, "said once"
    await store.drain(1)
