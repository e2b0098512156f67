"""The token cache: bounded, crash-safe, never wrong."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.token_cache import VERSIONS_MAX, TokenCache

VERSION = b"tokenizer 1"


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def ids(number: int, length: int = 12) -> np.ndarray:  # type: ignore[type-arg]
    return (np.arange(length, dtype=np.int32) * 31 + number) % 60_000


def open_cache(directory: Path | None = None, **changes: object) -> TokenCache:
    values = {"bytes_max": 1 << 16, "entries_max": 10_000, "version": VERSION, "width": 2, "directory": directory}
    return TokenCache(**{**values, **changes})  # type: ignore[arg-type]


def arenas(directory: Path, depth: int = 0) -> list[Path]:
    """The files, sorted; with a depth, only those that lie so many folders deep."""
    return sorted(directory.glob("*/" * depth + "*.arena") if depth else directory.rglob("*.arena"))


def fill(cache: TokenCache, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        cache.put(key(number), ids(number), dropped=number % 3)


def check(cache: TokenCache, number: int) -> bool:
    """Whether the entry is there; fails when it is there and wrong."""
    found = cache.get(key(number))
    if found is None:
        return False
    assert found[0].dtype == np.int32
    assert found[0].tolist() == ids(number).tolist()
    assert found[1] == number % 3
    return True


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize("width", [2, 4])
def test_what_was_put_is_got_in_memory_and_after_a_restart(directory: Path, width: int) -> None:
    for place in (None, directory):
        cache = open_cache(place, width=width)
        fill(cache, 100)
        assert all(check(cache, number) for number in range(100))
        assert cache.get(key(1000)) is None
        cache.close()
        cache.close()
    again = open_cache(directory, width=width)
    assert len(again) == 100
    assert all(check(again, number) for number in range(100))
    again.close()


def test_the_directory_is_private(directory: Path) -> None:
    open_cache(directory).close()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o077 == 0 for file in directory.rglob("*"))


def test_size_is_bounded_and_the_recent_half_survives(directory: Path) -> None:
    cache = open_cache(directory, bytes_max=1 << 14)
    fill(cache, 5000)
    assert sum(file.stat().st_size for file in directory.rglob("*.*")) <= 1 << 14
    assert all(check(cache, number) for number in range(4900, 5000))
    assert len(cache) < 400
    cache.close()


def test_entries_are_bounded() -> None:
    cache = open_cache(bytes_max=1 << 20, entries_max=100)
    fill(cache, 1000)
    assert len(cache) <= 100
    assert all(check(cache, number) for number in range(960, 1000))
    cache.close()


def test_a_text_larger_than_the_cache_is_not_remembered_and_does_no_harm() -> None:
    cache = open_cache(bytes_max=8192)
    fill(cache, 5)
    cache.put(key(99), np.zeros(100_000, np.int32), 0)
    assert cache.get(key(99)) is None
    fill(cache, 5)
    assert all(check(cache, number) for number in range(5))
    cache.close()


def test_another_tokenizer_version_or_width_has_a_folder_of_its_own(directory: Path) -> None:
    for number, changes in enumerate(({}, {"version": b"tokenizer 2"}, {"width": 4})):
        cache = open_cache(directory, **changes)
        assert len(cache) == 0
        fill(cache, 10 + number)
        cache.close()
    for number, changes in enumerate(({}, {"version": b"tokenizer 2"}, {"width": 4})):
        cache = open_cache(directory, **changes)
        assert len(cache) == 10 + number
        cache.close()


def test_folders_of_tokenizers_that_nobody_used_lately_are_removed(directory: Path) -> None:
    held = open_cache(directory, version=b"in use")
    for number in range(VERSIONS_MAX + 3):
        open_cache(directory, version=b"version %d" % number).close()
    stray = directory / "tokens-0.arena"
    stray.write_bytes(b"what an older release left")
    open_cache(directory, version=b"latest").close()
    assert len(list(directory.iterdir())) <= VERSIONS_MAX + 1
    assert not stray.exists()
    fill(held, 5)
    assert check(held, 0)
    held.refresh()
    assert held.role == "writer", "a folder that is in use stays"
    held.close()


@pytest.mark.parametrize("other", [{"version": b"tokenizer 2"}, {"width": 4}])
def test_what_another_tokenizer_wrote_into_a_file_is_never_believed(directory: Path, other: dict[str, object]) -> None:
    first, second = open_cache(directory), open_cache(directory / "second", **other)
    fill(first, 10)
    second.put(key(0), ids(7), 0)
    content = [file.read_bytes() for file in arenas(directory / "second")]
    for file, foreign in zip(arenas(directory, depth=1), content, strict=True):
        with file.open("r+b") as opened:
            opened.write(foreign)  # same places, same keys, other ids
    assert first.get(key(0)) is None
    first.close()
    again = open_cache(directory)
    assert again.get(key(0)) is None
    second.close()
    again.close()


@settings(max_examples=60)
@given(st.data())
def test_whatever_bytes_are_damaged_no_wrong_ids_are_returned(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("cache")
    cache = open_cache(directory, bytes_max=1 << 13)
    fill(cache, data.draw(st.integers(0, 300)))
    cache.close()
    for file in arenas(directory):
        content = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(0, 4))):
            at = data.draw(st.integers(0, len(content) - 1))
            junk = data.draw(st.binary(min_size=1, max_size=64))
            content[at : at + len(junk)] = junk
        file.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    again = open_cache(directory, bytes_max=1 << 13)
    for number in range(300):
        check(again, number)
    fill(again, 20, start=1000)
    assert all(check(again, number) for number in range(1000, 1020))
    again.close()


def test_a_page_damaged_while_it_runs_is_a_miss(directory: Path) -> None:
    cache = open_cache(directory)
    fill(cache, 50)
    with arenas(directory)[0].open("r+b") as file:
        file.seek(64 + 28 + 4)
        file.write(b"\xff\xff\xff\xff")
    assert not check(cache, 0)
    assert cache.damaged == 1
    assert all(check(cache, number) for number in range(1, 50))
    cache.close()


def test_a_torn_tail_loses_only_the_tail(directory: Path) -> None:
    cache = open_cache(directory)
    fill(cache, 50)
    end = cache._arenas[0].end
    cache.close()
    with arenas(directory)[0].open("r+b") as file:
        file.seek(end - 6)
        file.write(b"\0\0\0\0")
    again = open_cache(directory)
    assert len(again) == 49
    fill(again, 10, start=100)
    again.close()
    third = open_cache(directory)
    assert len(third) == 59
    third.close()


def test_a_killed_writer_leaves_a_usable_cache(directory: Path) -> None:
    child = os.fork()
    if not child:
        cache = open_cache(directory)
        fill(cache, 200)
        os._exit(9)  # as kill -9: nothing is closed or flushed
    os.waitpid(child, 0)
    again = open_cache(directory)
    assert all(check(again, number) for number in range(200))
    again.close()


def test_a_directory_that_cannot_be_used_leaves_a_cache_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    damage: list[str] = []
    cache = open_cache(tmp_path / "file" / "cache", on_damage=damage.append)
    fill(cache, 10)
    assert check(cache, 9)
    assert cache.role == "memory"
    assert "stays in memory" in damage[0]
    cache.close()


@pytest.mark.parametrize("how", ["truncated", "removed"])
def test_a_writer_whose_file_goes_away_goes_on_in_memory(directory: Path, how: str) -> None:
    damage: list[str] = []
    cache = open_cache(directory, on_damage=damage.append)
    fill(cache, 50)
    for file in arenas(directory):
        if how == "truncated":
            os.truncate(file, 100)
        else:
            file.unlink()
    cache.refresh()  # before it, a read of what is gone would end the process (SIGBUS)
    assert cache.role == "memory"
    assert len(damage) == 1
    fill(cache, 50)
    assert all(check(cache, number) for number in range(50))
    cache.refresh()
    assert len(damage) == 1
    cache.close()


class CacheAgainstDict(RuleBasedStateMachine):
    """Whatever happens to a cache and its reader, what they return is what was put last; nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.directory = Path(self.folder.name) / "cache"
        self.known: dict[int, int] = {}
        self.writer = self.open()
        self.reader = self.open()

    def open(self) -> TokenCache:
        return open_cache(self.directory, bytes_max=1 << 13, entries_max=60)

    @rule(first=st.integers(0, 200), count=st.integers(1, 40), length=st.integers(1, 40))
    def write(self, first: int, count: int, length: int) -> None:
        for number in range(first, first + count):
            if self.writer.get(key(number)) is None:
                # The ids of a text never change, as those of a tokenizer's version do not.
                self.known.setdefault(number, length)
                self.writer.put(key(number), ids(number, self.known[number]), number % 3)
                assert self.writer.get(key(number)) is not None, "what was just put is there"

    @rule(number=st.integers(0, 240), length=st.integers(1, 40))
    def read_and_remember(self, number: int, length: int) -> None:
        if self.reader.get(key(number)) is None:
            self.known.setdefault(number, length)
            self.reader.put(key(number), ids(number, self.known[number]), number % 3)
            assert self.reader.get(key(number)) is not None

    @rule()
    def follow(self) -> None:
        self.reader.refresh()
        self.writer.refresh()

    @rule()
    def restart_the_writer(self) -> None:
        self.writer.close()
        self.writer = self.open()
        assert self.writer.role == "writer"

    @rule()
    def restart_the_reader(self) -> None:
        self.reader.close()
        self.reader = self.open()
        assert self.reader.role == "reader"

    @invariant()
    def what_is_returned_was_put(self) -> None:
        for cache in (self.writer, self.reader):
            for number in range(0, 241, 7):
                found = cache.get(key(number))
                if found is not None:
                    assert (found[0].tolist(), found[1]) == (ids(number, self.known[number]).tolist(), number % 3)
        assert len(self.writer) <= 60
        assert len(self.reader) <= 120

    def teardown(self) -> None:
        self.reader.close()
        self.writer.close()
        self.folder.cleanup()


TestCacheAgainstDict = CacheAgainstDict.TestCase
TestCacheAgainstDict.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
