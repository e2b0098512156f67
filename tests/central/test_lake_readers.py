"""What people see: the columns are a contract, and their tools read the table as it is."""

import json
from pathlib import Path

import duckdb
import polars as pl
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from central.lake.maintenance import compact
from central.lake.schema import SPECS, TableName
from central.lake.store import DeltaStore, open_lake
from sluice.record import GapReason, Record
from tests.central.lake_support import (
    NOW_US,
    SPOOL,
    damaged,
    delta_writer,
    envelope,
    message,
    results,
    settings,
    status,
)

GOLDEN = Path(__file__).parent / "golden" / "lake_schema.json"
DAY_US = 86_400_000_000


@pytest.fixture(params=["written", "compacted"])
def lake(request: pytest.FixtureRequest, tmp_path: Path) -> DeltaStore:
    """Two flushes, two streams, two dates, all tables; as the writer left it, and after compaction."""
    writer, store = delta_writer(tmp_path)
    odd = [Record(NOW_US - DAY_US, "", {"nan": float("nan"), "inf": float("inf")}, {"": "empty"}), Record(NOW_US, "é𝔘")]
    writer.add([message(0, envelope(0, 100)), message(1, envelope(100, odd, stream="host"))], 0.0)
    writer.add([message(0, results(range(5)), "results"), message(0, status(110), "status")], 0.0)
    writer.flush()
    values = [envelope(102, 5, gaps=[(107, 3, GapReason.WITHHELD)]), damaged(110, 2)]
    writer.add([message(2 + i, value) for i, value in enumerate(values)], 0.0)
    writer.flush()
    if request.param == "compacted":
        assert compact(open_lake(settings(tmp_path)))["records"] == (2, 1)
    return store


def address(lake: DeltaStore, name: TableName = TableName.RECORDS) -> str:
    return lake.storage.table_uri(name.value)


def test_the_columns_are_those_of_the_contract() -> None:
    """Columns are only ever added: a change of this file breaks somebody's query."""
    found = {name.value: {field.name: str(field.type) for field in SPECS[name].schema} for name in TableName}
    assert found == json.loads(GOLDEN.read_text())


def test_every_table_stays_at_a_protocol_that_all_readers_know(lake: DeltaStore) -> None:
    for name in TableName:
        protocol = DeltaTable(address(lake, name)).protocol()
        assert (protocol.min_reader_version, protocol.min_writer_version) == (1, 2), name


def test_duckdb_reads_it(lake: DeltaStore) -> None:
    uris = lake.tables[TableName.RECORDS].open().uris()
    with duckdb.connect() as db:
        rows = db.execute(
            "select stream, count(*), count(distinct sequence), min(event_time)::varchar, sum(metrics['value']) "
            "from read_parquet($1, hive_partitioning = true) group by stream order by stream",
            [uris],
        ).fetchall()
        assert [(row[0], row[1], row[2]) for row in rows] == [("host", 2, 2), ("logs", 105, 105)]
        dates = db.execute("select distinct date::varchar from read_parquet($1) order by 1", [uris]).fetchall()
        assert dates == [("2026-09-20",), ("2026-09-21",)]
        text = db.execute("select text from read_parquet($1) where sequence = 101", [uris]).fetchone()
        assert text == ("é𝔘",)


def test_polars_reads_it(lake: DeltaStore) -> None:
    frame = pl.scan_delta(address(lake)).filter(pl.col("stream") == "host").sort("sequence").collect()
    assert frame["sequence"].to_list() == [100, 101]
    assert frame["device_id"].to_list() == ["device-1"] * 2
    assert frame.schema["event_time"] == pl.Datetime("us", "UTC")


def test_pandas_and_pyarrow_read_it(lake: DeltaStore) -> None:
    frame = DeltaTable(address(lake)).to_pandas()
    assert len(frame) == 107
    assert set(frame["spool_id"]) == {SPOOL.hex()}
    odd = DeltaTable(address(lake)).to_pyarrow_table(filters=[("sequence", "=", 100)]).to_pylist()[0]
    metrics = dict(odd["metrics"])
    assert metrics["nan"] != metrics["nan"]
    assert metrics["inf"] == float("inf")
    assert odd["labels"] == [("", "empty")]
    assert odd["event_time"].isoformat() == "2026-09-20T14:13:20+00:00"


def test_all_tables_are_read_by_duckdb_and_polars(lake: DeltaStore) -> None:
    counts = {TableName.RESULTS: 5, TableName.LEDGER: 2, TableName.QUARANTINE: 1, TableName.STATUS: 1}
    for name, count in counts.items():
        uris = lake.tables[name].open().uris()
        with duckdb.connect() as db:
            assert db.execute("select count(*) from read_parquet($1)", [uris]).fetchone() == (count,)
        assert pl.read_delta(address(lake, name)).height == count


def test_partitions_and_statistics_spare_files(tmp_path: Path) -> None:
    """Predicates on partition columns and on columns with statistics are answered without opening other files."""
    writer, store = delta_writer(tmp_path)
    for step in range(4):
        writer.add([message(step, envelope(step * 10, 10, stream=f"s{step % 2}", device=f"device-{step}"))], 0.0)
        writer.flush()
    dataset = DeltaTable(address(store)).to_pyarrow_dataset()
    assert len(list(dataset.get_fragments(ds.field("stream") == "s1"))) == 2
    assert len(list(dataset.get_fragments(ds.field("device_id") == "device-2"))) == 1
    assert len(list(dataset.get_fragments(ds.field("sequence") > 25))) == 2


def test_files_have_large_row_groups_zstd_statistics_and_a_page_index(tmp_path: Path) -> None:
    writer, store = delta_writer(tmp_path, row_group_rows=1000)
    for step in range(50):
        writer.add([message(step, envelope(step * 50, 50))], 0.0)
    writer.flush()
    (path,) = store.tables[TableName.RECORDS].open().paths()
    found = pq.read_metadata(tmp_path / "records" / path)
    assert [found.row_group(i).num_rows for i in range(found.num_row_groups)] == [1000, 1000, 500]
    columns = {
        found.row_group(0).column(i).path_in_schema: found.row_group(0).column(i) for i in range(found.num_columns)
    }
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert columns["sequence"].statistics.max == 999
    assert columns["device_id"].has_offset_index
    assert columns["device_id"].has_column_index
    assert "RLE_DICTIONARY" in columns["device_id"].encodings


def test_nothing_but_whole_files_is_ever_in_a_tables_folder(tmp_path: Path) -> None:
    """A glob over the folder works at any time: whatever is under way is elsewhere."""
    writer, store = delta_writer(tmp_path)
    writer.add([message(0, envelope(0, 5))], 0.0)
    store.storage.stage().write_bytes(b"half a file")
    writer.flush()
    with duckdb.connect() as db:
        found = db.execute(f"select count(*) from read_parquet('{tmp_path}/records/**/*.parquet')").fetchone()
    assert found == (5,)
