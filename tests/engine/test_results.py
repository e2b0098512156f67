"""The result stores: one behaviour, in memory and on disk."""

import pickle
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from engine.results import DiskResults, MemoryResults, Output, ResultStore

Opener = Callable[..., ResultStore]


@pytest.fixture(params=["memory", "disk"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    opened: list[ResultStore] = []

    def open_(bytes_max: int = 1 << 20, ttl_s: float = 60.0) -> ResultStore:
        if request.param == "memory":
            opened.append(MemoryResults(bytes_max, ttl_s))
        else:
            opened.append(DiskResults(tmp_path / "results", bytes_max, ttl_s))
        return opened[-1]

    yield open_
    for store in opened:
        store.close()
        store.close()


def test_what_was_put_is_got_and_the_latest_counts(open_store: Opener) -> None:
    store = open_store()
    store.put(b"a", b"one")
    store.put(b"b", b"")
    store.put(b"a", b"two")
    assert (store.get(b"a"), store.get(b"b"), store.get(b"c")) == (b"two", b"", None)


def test_size_is_bounded(open_store: Opener) -> None:
    limit = 1 << 20
    store = open_store(bytes_max=limit)
    for number in range(1500):
        store.put(number.to_bytes(8, "little"), bytes(4096))
    kept = [number for number in range(1500) if store.get(number.to_bytes(8, "little")) is not None]
    assert 20 < len(kept) < 400
    assert 1499 in kept


def test_an_old_result_is_forgotten(open_store: Opener) -> None:
    store = open_store(ttl_s=1e-9)
    store.put(b"a", b"one")
    assert store.get(b"a") is None


def test_in_memory_age_counts_from_the_last_write() -> None:
    now = [0.0]
    store = MemoryResults(1000, 10.0, clock=lambda: now[0])
    store.put(b"a", b"one")
    now[0] = 9.9
    assert store.get(b"a") == b"one"
    now[0] = 10.0
    assert store.get(b"a") is None
    assert store.bytes == 0


def test_on_disk_results_survive_a_restart_in_a_private_directory(tmp_path: Path) -> None:
    store = DiskResults(tmp_path / "results", 1 << 20, 60)
    store.put(b"a", b"one")
    store.close()
    again = DiskResults(tmp_path / "results", 1 << 20, 60)
    assert again.get(b"a") == b"one"
    again.close()
    assert (tmp_path / "results").stat().st_mode & 0o777 == 0o700


def test_a_planted_pickle_is_never_loaded(tmp_path: Path) -> None:
    damage: list[str] = []
    store = DiskResults(tmp_path / "results", 1 << 20, 60, damage.append)
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    database = sqlite3.connect(tmp_path / "results" / "cache.db")
    database.execute(
        "INSERT INTO Cache(key, raw, store_time, access_time, access_count, size, mode, value)"
        " VALUES (?, 1, 0, 0, 0, 0, 4, ?)",
        (b"planted".hex(), trap),
    )
    database.commit()
    database.close()
    assert store.get(b"planted") is None
    assert damage
    store.close()
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> object:
        return Path.touch, (self.file,)


def test_a_changed_value_is_a_miss(tmp_path: Path) -> None:
    damage: list[str] = []
    store = DiskResults(tmp_path / "results", 1 << 20, 60, damage.append)
    store.put(b"a", b"one")
    database = sqlite3.connect(tmp_path / "results" / "cache.db")
    database.execute("UPDATE Cache SET value = ?", (b"\0\0\0\0two",))
    database.commit()
    database.close()
    assert store.get(b"a") is None
    assert damage == ["result cache: checksum does not hold"]
    store.close()


def test_a_damaged_database_is_started_afresh(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    store = DiskResults(folder, 1 << 20, 60)
    store.put(b"a", b"one")
    store.close()
    (folder / "cache.db").write_bytes(b"no database at all" * 1000)
    damage: list[str] = []
    again = DiskResults(folder, 1 << 20, 60, damage.append)
    assert again.get(b"a") is None
    again.put(b"a", b"two")
    assert again.get(b"a") == b"two"
    assert len(damage) == 1
    again.close()


@given(
    arrays.arrays(st.sampled_from([np.float16, np.float32]), arrays.array_shapes(min_dims=1, max_dims=2, max_side=8)),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
)
def test_an_output_survives_packing(row: np.ndarray, tokens: int, dropped: int) -> None:  # type: ignore[type-arg]
    again = Output.unpack(Output(row, tokens, dropped).pack())
    assert again is not None
    np.testing.assert_array_equal(again.row, row)
    assert (again.row.dtype, again.tokens, again.dropped) == (row.dtype, tokens, dropped)


@given(st.binary(max_size=200))
def test_unpacking_junk_gives_nothing_or_an_output_but_never_raises(data: bytes) -> None:
    assert Output.unpack(data) is None or isinstance(Output.unpack(data), Output)
