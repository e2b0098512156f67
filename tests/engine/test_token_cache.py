"""The token cache: bounded, crash-safe, never wrong."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.token_cache import TokenCache

VERSION = b"tokenizer 1"


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def ids(number: int, length: int = 12) -> np.ndarray:  # type: ignore[type-arg]
    return (np.arange(length, dtype=np.int32) * 31 + number) % 60_000


def open_cache(directory: Path | None = None, **changes: object) -> TokenCache:
    values = {"bytes_max": 1 << 16, "entries_max": 10_000, "version": VERSION, "width": 2, "directory": directory}
    return TokenCache(**{**values, **changes})  # type: ignore[arg-type]


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
    assert all(file.stat().st_mode & 0o077 == 0 for file in directory.iterdir())


def test_size_is_bounded_and_the_recent_half_survives(directory: Path) -> None:
    cache = open_cache(directory, bytes_max=1 << 14)
    fill(cache, 5000)
    assert sum(file.stat().st_size for file in directory.iterdir()) <= 1 << 14
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


def test_another_tokenizer_version_or_width_starts_empty(directory: Path) -> None:
    for changes in ({}, {"version": b"tokenizer 2"}, {"width": 4}, {}):
        cache = open_cache(directory, **changes)
        assert len(cache) == 0
        fill(cache, 10)
        cache.close()


@settings(max_examples=60)
@given(st.data())
def test_whatever_bytes_are_damaged_no_wrong_ids_are_returned(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("cache")
    cache = open_cache(directory, bytes_max=1 << 13)
    fill(cache, data.draw(st.integers(0, 300)))
    cache.close()
    for number in (0, 1):
        file = directory / f"tokens-{number}.arena"
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
    with (directory / "tokens-0.arena").open("r+b") as file:
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
    with (directory / "tokens-0.arena").open("r+b") as file:
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


def test_a_second_process_keeps_its_cache_in_memory(directory: Path) -> None:
    first = open_cache(directory)
    second = open_cache(directory)
    assert first.persistent
    assert not second.persistent
    fill(second, 10)
    assert len(first) == 0
    first.close()
    second.close()
