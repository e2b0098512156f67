"""Looking after a lake, while it is being written."""

import os
import time
from pathlib import Path

import pytest

from central.lake.maintenance import compact, describe, vacuum, verify
from central.lake.schema import TableName
from central.lake.store import DeltaStore, open_lake
from central.lake.writer import LakeWriter
from sluice.errors import Permanent
from sluice.record import GapReason
from tests.central.lake_support import delta_writer, envelope, message, positions, settings


def filled(folder: Path, flushes: int = 6, **fields: object) -> tuple[LakeWriter, DeltaStore]:
    writer, store = delta_writer(folder, **fields)
    for step in range(flushes):
        writer.add([message(step, envelope(step * 10, 8, gaps=[(step * 10 + 8, 2, GapReason.EXPIRED)]))], 0.0)
        writer.flush()
    return writer, store


def age(path: Path, hours: float) -> None:
    then = time.time() - hours * 3600
    os.utime(path, (then, then))


@pytest.mark.parametrize("checkpoint_interval_commits", [3, 100])
def test_describe_tells_versions_rows_and_offsets(tmp_path: Path, checkpoint_interval_commits: int) -> None:
    filled(tmp_path, checkpoint_interval_commits=checkpoint_interval_commits)
    found = {table.name: table for table in describe(open_lake(settings(tmp_path)))}
    assert set(found) == {name.value for name in TableName}
    assert (found["records"].rows, found["records"].files, found["records"].partitions) == (48, 6, 1)
    assert found["records"].offsets == {"default/records/0": 6}
    assert found["ledger"].offsets == {"default/records/0": 6}
    assert found["records"].bytes == sum(
        f.stat().st_size for f in (tmp_path / "records").rglob("stream=*/**/*.parquet")
    )


def test_compaction_keeps_rows_offsets_and_what_is_written_meanwhile(tmp_path: Path) -> None:
    writer, store = filled(tmp_path)
    before = positions(store)
    writer.add([message(6, envelope(60, 3))], 0.0)
    assert compact(open_lake(settings(tmp_path)))["records"] == (6, 1)
    assert positions(store) == before
    writer.flush()
    assert writer.assign([("records", 0)]) == {("records", 0): 7}
    writer.add([message(7, envelope(0, 65))], 0.0)
    writer.flush()
    assert [sequence for _, _, sequence in positions(store)][-5:] == [60, 61, 62, 63, 64]
    assert len(positions(store)) == len(set(positions(store))) == len(before) + 5


def test_vacuum_removes_what_nobody_names_and_nothing_else(tmp_path: Path) -> None:
    writer, store = filled(tmp_path)
    compact(open_lake(settings(tmp_path)))
    folder = next((tmp_path / "records").rglob("date=*"))
    orphan, young = folder / "orphan.parquet", folder / "young.parquet"
    staged = store.storage.stage()
    for path in (orphan, young, staged):
        path.write_bytes(b"left by a crash")
    age(orphan, 30)
    age(staged, 30)
    before = positions(store)

    lake = open_lake(settings(tmp_path))
    would = vacuum(lake, 24, dry_run=True)
    assert (len(would["records"]), orphan.exists(), staged.exists()) == (1, True, True)
    done = vacuum(lake, 24, dry_run=False)
    assert [Path(path).name for path in done["records"]] == ["orphan.parquet"]
    assert (orphan.exists(), staged.exists(), young.exists()) == (False, False, True)
    assert len(vacuum(lake, 0, dry_run=False)["records"]) == 7
    assert positions(store) == before
    assert verify(lake) == []
    writer.add([message(6, envelope(0, 64))], 0.0)
    writer.flush()
    assert len(positions(store)) == len(before) + 4


def test_verify_names_what_is_wrong(tmp_path: Path) -> None:
    _, store = filled(tmp_path, flushes=3)
    lake = open_lake(settings(tmp_path))
    assert verify(lake) == []
    missing, cut, garbled = (
        tmp_path / "records" / path for path in sorted(store.tables[TableName.RECORDS].open().paths())
    )
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    garbled.write_bytes(bytes(garbled.stat().st_size))
    problems = sorted(line.split(": ", 1)[1].split(" ")[0] for line in verify(lake))
    assert problems == sorted(["missing", str(cut.stat().st_size), "unreadable:"])


def test_a_place_without_a_lake_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(Permanent, match="there is no lake"):
        open_lake(settings(tmp_path))
    assert list(tmp_path.iterdir()) == [], "looking changes nothing"
