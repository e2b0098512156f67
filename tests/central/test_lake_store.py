"""What a lake's store promises to the commit protocol: the same for Delta on a directory and for the one in memory."""

from collections.abc import Callable
from pathlib import Path

import pytest

from central.lake.commit import Conflict, Fenced, Span, commit_primary, restart
from central.lake.schema import TableName
from central.lake.store import DeltaStore, LakeStore
from central.lake.table import DataFile
from tests.central.lake_support import NOW_US, MemoryStore, batch, message, settings, table, writer_of

NAME = TableName.LEDGER


def delta(folder: Path) -> DeltaStore:
    store = DeltaStore(settings(folder))
    store.prepare()
    return store


@pytest.fixture(params=[delta, lambda _: MemoryStore()], ids=["delta", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> LakeStore:
    make: Callable[[Path], LakeStore] = request.param
    return make(tmp_path / "lake")


def gap_files(store: LakeStore, first: int) -> list[DataFile]:
    import pyarrow as pa

    from central.lake.rows import gap_values
    from central.lake.schema import LEDGER
    from sluice.record import Gap, GapReason

    values = gap_values(batch(0, 1), Gap(first, 2, GapReason.WITHHELD), NOW_US)
    return store.write(NAME, pa.Table.from_pylist([values], LEDGER), "test")


def firsts(store: LakeStore) -> list[int]:
    return sorted(table(store, NAME)["first_sequence"].to_pylist())


def test_data_and_offsets_become_visible_together(store: LakeStore) -> None:
    before = store.tables[NAME].open()
    assert (before.version_of("c/t/0"), before.paths()) == (None, [])
    before.commit(gap_files(store, 10), {"c/t/0": 5, "c/t/1": 7})
    after = store.tables[NAME].open()
    assert (after.version_of("c/t/0"), after.version_of("c/t/1"), after.version_of("c/t/2")) == (5, 7, None)
    assert firsts(store) == [10]


def test_offsets_advance_without_data(store: LakeStore) -> None:
    store.tables[NAME].open().commit([], {"c/t/0": 5})
    assert store.tables[NAME].open().version_of("c/t/0") == 5


def test_a_partition_is_committed_once_on_top_of_a_snapshot(store: LakeStore) -> None:
    one, other = store.tables[NAME].open(), store.tables[NAME].open()
    one.commit(gap_files(store, 10), {"c/t/0": 5})
    with pytest.raises(Conflict):
        other.commit(gap_files(store, 20), {"c/t/0": 6})
    assert firsts(store) == [10]


def test_other_partitions_may_be_committed_meanwhile(store: LakeStore) -> None:
    one, other = store.tables[NAME].open(), store.tables[NAME].open()
    one.commit(gap_files(store, 10), {"c/t/0": 5})
    other.commit(gap_files(store, 20), {"c/t/1": 6})
    assert firsts(store) == [10, 20]
    assert store.tables[NAME].open().version_of("c/t/0") == 5


def test_published_files_that_no_commit_names_are_not_seen_and_can_be_removed(store: LakeStore) -> None:
    files = gap_files(store, 10)
    assert store.tables[NAME].open().paths() == []
    store.remove(NAME, files)
    store.remove(NAME, files)


def test_an_owner_whose_partition_has_moved_is_fenced(store: LakeStore) -> None:
    log = store.tables[NAME]
    commit_primary(log, gap_files(store, 10), [Span("c/t/0", None, 5)])
    for start in (None, 4, 6):
        with pytest.raises(Fenced):
            commit_primary(log, gap_files(store, 20), [Span("c/t/0", start, 9)])
    commit_primary(log, gap_files(store, 30), [Span("c/t/0", 5, 9)])
    assert firsts(store) == [10, 30]


def test_a_restarted_partition_moves_back_in_all_tables(store: LakeStore) -> None:
    for name in (NAME, TableName.RECORDS):
        store.tables[name].open().commit([], {"c/t/0": 500, "c/t/1": 3})
    restart([store.tables[NAME]], store.tables[TableName.RECORDS], "c/t/0", 0)
    for name in (NAME, TableName.RECORDS):
        snapshot = store.tables[name].open()
        assert (snapshot.version_of("c/t/0"), snapshot.version_of("c/t/1")) == (0, 3)


def test_offsets_survive_checkpoints_and_the_removal_of_old_log_entries(tmp_path: Path) -> None:
    config = settings(tmp_path / "lake", checkpoint_interval_commits=4)
    store = DeltaStore(config)
    store.prepare()
    store.tables[NAME].open().commit([], {"c/t/9": 99})
    for version in range(10):
        store.tables[NAME].open().commit([], {"c/t/0": version})
    snapshot = store.tables[NAME].open()
    assert (snapshot.version_of("c/t/9"), snapshot.version_of("c/t/0")) == (99, 9)
    assert (tmp_path / "lake" / NAME.value / "_delta_log" / "_last_checkpoint").exists()


def test_the_writer_works_the_same_on_both(store: LakeStore, tmp_path: Path) -> None:
    from tests.central.lake_support import envelope, positions

    writer = writer_of(store, settings(tmp_path / "lake"))
    assert writer.assign([("records", 0)]) == {("records", 0): None}
    writer.add([message(0, envelope(0, 3)), message(1, envelope(2, 3))], 0.0)
    writer.flush()
    assert [sequence for _, _, sequence in positions(store)] == [0, 1, 2, 3, 4]
    assert writer.assign([("records", 0)]) == {("records", 0): 2}
