"""Damage costs what it hit, is always noticed and always declared, and never lets a sequence be used twice."""

import io
import pickle
import random
import shutil
import sqlite3
from pathlib import Path

import pytest

from sluice.errors import Permanent
from sluice.spool import Spool
from sluice.spool_recovery import wal_broken
from tests.sluice.spool_examples import Item, events, everything, open_spool, positions

DATABASE = "db/cache.db"
WAL = "db/cache.db-wal"
FLIPS = {DATABASE: 50, WAL: 15}


def fill(folder: Path, *, checkpoint: bool, items: int = 40) -> tuple[bytes, set[tuple[bytes, int]], dict[int, bytes]]:
    """A spool with settled, half settled and unsettled items, as a crash leaves it: with or without a WAL.

    Returns its id, the unsettled positions, and the payloads of all items that there ever were.
    """
    work = folder.with_name("work")
    spool = open_spool(work)
    rng = random.Random(7)
    for n in range(0, items, 4):
        spool.append(
            [Item(f"i{k}", rng.randint(1, 9), rng.randint(0, 2), rng.choice([0, 700, 9000])) for k in range(n, n + 4)],
            {"c": b"%d" % n},
        )
    payloads = {item.first_sequence: item.payload for item in everything(spool)}
    spool.settle(spool.spool_id, [(0, 30), (60, 75)])
    if checkpoint:
        spool.close()
        shutil.copytree(work, folder)
        spool = open_spool(work)
    else:
        shutil.copytree(work, folder)
    found = everything(spool)
    spool_id = spool.spool_id
    spool.close()
    shutil.rmtree(work)
    return spool_id, positions(found), payloads


def flip(file: Path, at: int, mask: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= mask
    file.write_bytes(data)


@pytest.mark.parametrize("target", [DATABASE, WAL])
def test_one_changed_byte_is_never_given_out_and_never_a_silent_loss(tmp_path: Path, target: str) -> None:
    original = tmp_path / "original"
    spool_id, pending, payloads = fill(original, checkpoint=target == DATABASE)
    size = (original / target).stat().st_size
    rng = random.Random(target)
    outcomes = {"intact": 0, "declared": 0, "new spool_id": 0}
    for number in range(FLIPS[target]):
        folder = tmp_path / f"flip{number}"
        shutil.copytree(original, folder)
        flip(folder / target, rng.randrange(size), rng.randint(1, 255))
        log = io.StringIO()
        with open_spool(folder, log) as spool:
            items = everything(spool)
            for item in items:
                if not item.receipt:
                    assert item.payload == payloads[item.first_sequence]
            expired = sum(item.record_count for item in items if item.receipt)
            told = sum(e["count"] for e in events(log) if e["event"] == "spool_damaged")
            assert told == expired
            first = spool.append([Item("new", 3)])
            assert (spool.spool_id, first) not in pending
            if spool.spool_id == spool_id:
                # Every position that was accepted and not settled is here, as a record or as declared loss.
                assert positions(items) == pending
                assert first == max(s for _, s in pending) + 1
                outcomes["declared" if expired else "intact"] += 1
            else:
                assert any(e["event"] == "spool_recovered" and e["old_spool_id"] for e in events(log))
                # Settled items may be back (the gateway knows them); nothing is invented.
                assert {s for _, s in positions(items)} <= set(range(max(s for _, s in pending) + 1))
                outcomes["new spool_id"] += 1
            spool.settle(spool_id, [(0, 2**40)])
            spool.settle(spool.spool_id, [(0, 2**40)])
            assert spool.empty
        shutil.rmtree(folder)
    # Damage to the log breaks the chain of its checksums; in the database most bytes are of one item.
    expected = {"intact", "declared"} if target == DATABASE else {"new spool_id"}
    assert {name for name, count in outcomes.items() if count} >= expected


def test_a_damaged_value_costs_its_item_only(tmp_path: Path) -> None:
    with open_spool(tmp_path / "s") as spool:
        spool.append([Item(n, 10, size_bytes=50_000) for n in ("a", "b", "c")])
        spool_id = spool.spool_id
    database = tmp_path / "s" / DATABASE
    flip(database, database.read_bytes().index(b"b" * 3000) + 1000, 0xFF)
    log = io.StringIO()
    with open_spool(tmp_path / "s", log) as spool:
        assert [(i.first_sequence, i.record_count, i.receipt) for i in everything(spool)] == [
            (0, 10, False),
            (10, 10, True),
            (20, 10, False),
        ]
        assert spool.spool_id == spool_id
        assert spool.status().expired_records == 10
        assert spool.append([Item("d")]) == 30
    damaged = next(e for e in events(log) if e["event"] == "spool_damaged")
    assert (damaged["count"], damaged["first_sequence"]) == (10, 10)


def test_a_lost_commit_in_the_log_begins_a_new_spool_id(tmp_path: Path) -> None:
    spool = open_spool(tmp_path / "s")
    for n in range(6):
        spool.append([Item(f"i{n}", 10)])
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    old_id = spool.spool_id
    spool.close()
    wal = tmp_path / "copy" / WAL
    assert not wal_broken(tmp_path / "copy" / DATABASE)
    # SQLite would open this without an error, and without the last commits.
    flip(wal, wal.stat().st_size * 3 // 4, 0x10)
    assert wal_broken(tmp_path / "copy" / DATABASE)
    with open_spool(tmp_path / "copy") as copy:
        assert copy.spool_id != old_id
        assert copy.next_sequence == 0
        old = everything(copy)
        assert {item.spool_id for item in old} == {old_id}
        copy.append([Item("new")])
        assert copy.settle(old_id, [(0, 100)]) == sum(item.record_count for item in old)
        assert [item.spool_id for item in everything(copy)] == [copy.spool_id]
    # And what was recovered stays recovered.
    with open_spool(tmp_path / "copy") as copy:
        assert copy.next_sequence == 1


@pytest.mark.parametrize("content", [b"", b"not a database" * 1000, b"SQLite format 3\0" + b"\xff" * 9000])
def test_a_destroyed_database_is_replaced_and_said_to_be(tmp_path: Path, content: bytes) -> None:
    with open_spool(tmp_path / "s") as spool:
        spool.append([Item("a", 10)])
        old_id = spool.spool_id
    (tmp_path / "s" / DATABASE).write_bytes(content)
    log = io.StringIO()
    with open_spool(tmp_path / "s", log) as spool:
        assert spool.spool_id != old_id
        assert spool.empty
        spool.append([Item("b")])
    assert "spool_recovered" in [e["event"] for e in events(log)]


def test_an_index_that_lost_its_entries_is_noticed(tmp_path: Path) -> None:
    with open_spool(tmp_path / "s") as spool:
        spool.append([Item(f"i{n}", 2) for n in range(10)])
        spool_id = spool.spool_id
    _remove_from_index(tmp_path / "s" / DATABASE)
    with open_spool(tmp_path / "s") as spool:
        assert spool.spool_id == spool_id
        assert len(everything(spool)) == 10
        assert not any(item.receipt for item in everything(spool))


def _remove_from_index(database: Path) -> None:
    """Empties the leaf page of the index by its cell count, as no SQL can."""
    connection = sqlite3.connect(database)
    (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'Cache_key_raw'").fetchone()
    (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    data = bytearray(database.read_bytes())
    at = (root - 1) * page_bytes
    assert data[at] == 0x0A, "a leaf"
    data[at + 3 : at + 5] = (2).to_bytes(2, "big")
    database.write_bytes(data)


def test_rows_that_vanish_while_it_is_open_are_declared(tmp_path: Path) -> None:
    with open_spool(tmp_path / "s") as spool:
        spool.append([Item(f"i{n}", 2) for n in range(10)])
    connection = sqlite3.connect(tmp_path / "s" / DATABASE)
    connection.execute(
        "DELETE FROM Cache WHERE rowid IN (SELECT rowid FROM Cache WHERE typeof(key) = 'integer' LIMIT 3)"
    )
    connection.commit()
    connection.close()
    log = io.StringIO()
    with open_spool(tmp_path / "s", log) as spool:
        items = everything(spool)
        assert positions(items) == {(spool.spool_id, n) for n in range(20)}
        assert [(i.first_sequence, i.record_count) for i in items if i.receipt] == [(0, 6)]
        assert spool.status().expired_records == 6


def test_a_recovery_that_was_interrupted_is_done_again(tmp_path: Path) -> None:
    with open_spool(tmp_path / "s") as spool:
        spool.append([Item("a", 10), Item("b", 10)])
        spool_id = spool.spool_id
    # As a crash in mid-recovery leaves it: the old one set aside, a half-made new one.
    (tmp_path / "s" / "db").rename(tmp_path / "s" / "db.damaged")
    (tmp_path / "s" / "db.new").mkdir()
    (tmp_path / "s" / "db.new" / "cache.db").write_bytes(b"half")
    with open_spool(tmp_path / "s") as spool:
        assert spool.spool_id == spool_id
        assert len(everything(spool)) == 2
        assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["db", "lock"]


def test_a_planted_pickle_is_never_loaded(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return (marker.write_text, ("x",))

    with open_spool(tmp_path / "s") as spool:
        spool.append([Item("a", 10)])
        key = everything(spool)[0].key
    connection = sqlite3.connect(tmp_path / "s" / DATABASE)
    connection.execute("UPDATE Cache SET mode = 4, value = ? WHERE key = ?", (pickle.dumps(Bomb()), key))
    connection.execute("INSERT INTO Cache(key, raw, mode, value) VALUES (?, 0, 4, ?)", (pickle.dumps(Bomb()),) * 2)
    connection.commit()
    connection.close()
    with open_spool(tmp_path / "s") as spool:
        assert [item.receipt for item in everything(spool)] == [True]
        spool.settle(spool.spool_id, [(0, 10)])
    assert not marker.exists()


def test_damage_met_while_working_is_repaired_without_an_error(tmp_path: Path) -> None:
    spool = open_spool(tmp_path / "s")
    spool.append([Item(f"i{n}", 2, size_bytes=3000) for n in range(40)])
    spool.close()
    log = io.StringIO()
    spool = open_spool(tmp_path / "s", log)
    # Everything but the first page: the tables' roots, too.
    database = tmp_path / "s" / DATABASE
    size = database.stat().st_size
    with database.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))
    try:
        first = spool.append([Item("new", 1)])
        items = everything(spool)
        assert (spool.spool_id, first) in positions(items)
        for item in items:
            assert item.receipt or item.payload.startswith((b"new", b"i"))
    finally:
        spool.close()
    assert "spool_recovered" in [e["event"] for e in events(log)]


def test_the_owner_is_checked_after_a_recovery_too(tmp_path: Path) -> None:
    with open_spool(tmp_path / "s") as spool:
        config = spool.config
        spool.append([Item("a")])
    (tmp_path / "s" / "db").rename(tmp_path / "s" / "db.damaged")
    with pytest.raises(Permanent, match="belongs to"):
        Spool(config, owner="site/other", declare=lambda *_: b"")
