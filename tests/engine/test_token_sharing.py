"""The token cache between processes: one writes, the others follow, whatever happens to the one that writes."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import token_arena
from engine.token_arena import Arena
from engine.token_cache import TAKE_OVER_EVERY_S
from tests.engine.test_token_cache import arenas, check, fill, key, open_cache

# Another process that opens the cache and does as it is told, one line at a time.
WRITER = """
import sys
from pathlib import Path
from tests.engine.test_token_cache import fill, open_cache
cache = open_cache(Path(sys.argv[1]), bytes_max=int(sys.argv[2]))
print(cache.role, flush=True)
for line in sys.stdin:
    start, count = map(int, line.split())
    fill(cache, count, start)
    print("done", flush=True)
"""
ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """Stands still until the test moves it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Other:
    """The other process."""

    def __init__(self, directory: Path, bytes_max: int = 1 << 16) -> None:
        command = [sys.executable, "-c", WRITER, str(directory), str(bytes_max)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, bufsize=1, **pipes)  # type: ignore[call-overload]
        self.role = self.process.stdout.readline().strip()

    def order(self, start: int, count: int) -> None:
        self.process.stdin.write(f"{start} {count}\n")
        self.process.stdin.flush()

    def fill(self, start: int, count: int) -> None:
        self.order(start, count)
        assert self.process.stdout.readline() == "done\n"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.end()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(20)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def other(directory: Path) -> Iterator[Callable[..., Other]]:
    started: list[Other] = []

    def start(bytes_max: int = 1 << 16) -> Other:
        started.append(Other(directory, bytes_max))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.kill()


def test_a_reader_follows_what_the_writer_appends_and_keeps_its_own_beside(
    directory: Path, other: Callable[..., Other]
) -> None:
    writer = other()
    writer.fill(0, 50)
    damage: list[str] = []
    reader = open_cache(directory, on_damage=damage.append)
    assert (writer.role, reader.role) == ("writer", "reader")
    assert all(check(reader, number) for number in range(50))
    writer.fill(50, 50)
    assert not check(reader, 99), "it follows when it is told to"
    reader.refresh()
    assert all(check(reader, number) for number in range(100))
    before = [file.read_bytes() for file in arenas(directory)]
    fill(reader, 10, start=1000)
    assert all(check(reader, number) for number in range(1000, 1010))
    assert [file.read_bytes() for file in arenas(directory)] == before, "a reader writes nothing"
    assert damage == []
    reader.close()


def test_an_arena_that_is_emptied_while_it_is_read_makes_misses_and_never_wrong_ids(
    directory: Path, other: Callable[..., Other]
) -> None:
    writer = other(1 << 13)
    writer.fill(0, 60)
    reader = open_cache(directory, bytes_max=1 << 13)
    found = 0
    for turn in range(1, 30):
        writer.order(turn * 40, 400)  # it writes, and turns, while we read
        while not _answered(writer):
            found += sum(check(reader, number) for number in range(turn * 40 + 450))
            reader.refresh()
    assert found > 100
    reader.refresh()
    assert all(check(reader, number) for number in range(29 * 40 + 390, 29 * 40 + 400)), "the last ones are there"
    reader.close()


def _answered(writer: Other) -> bool:
    import select

    ready, _, _ = select.select([writer.process.stdout], [], [], 0)
    return bool(ready) and writer.process.stdout.readline() == "done\n"


@pytest.mark.parametrize("round_number", range(4))
def test_a_writer_killed_in_mid_append_harms_neither_its_readers_nor_the_next_writer(
    directory: Path, other: Callable[..., Other], round_number: int
) -> None:
    writer = other()
    writer.fill(0, 30)
    reader = open_cache(directory, clock=Clock())
    writer.order(30, 10_000_000)
    for number in range(100 * (round_number + 1)):
        reader.refresh()
        check(reader, number)
    writer.kill()
    reader.refresh()
    seen = {number for number in range(5000) if check(reader, number)}
    fill(reader, 20, start=20_000_000)
    assert reader.role == "reader", "it is not yet time to take over"
    following = open_cache(directory)
    assert following.role == "writer"
    assert {number for number in range(5000) if check(following, number)} == seen
    fill(following, 20, start=30_000_000)
    reader.refresh()
    assert all(check(reader, number) for number in range(30_000_000, 30_000_020))
    reader.close()
    following.close()


def test_one_reader_takes_the_place_of_a_writer_that_is_gone(directory: Path, other: Callable[..., Other]) -> None:
    writer = other()
    writer.fill(0, 50)
    clock = Clock()
    readers = [open_cache(directory, clock=clock) for _ in range(2)]

    def roles() -> list[str]:
        for reader in readers:
            reader.refresh()
        return [reader.role for reader in readers]

    fill(readers[0], 5, start=1000)
    clock.now += TAKE_OVER_EVERY_S
    assert roles() == ["reader", "reader"], "the writer is there"
    writer.order(50, 10_000_000)
    writer.kill()
    assert roles() == ["reader", "reader"], "they do not ask before each batch"
    clock.now += TAKE_OVER_EVERY_S
    assert roles() == ["writer", "reader"], "only one of them"
    assert all(check(readers[0], number) for number in range(50))
    fill(readers[0], 10, start=20_000_000)
    assert roles() == ["writer", "reader"]
    assert all(check(readers[1], number) for number in (*range(50), *range(20_000_000, 20_000_010)))
    assert other().role == "reader"
    readers[0].close()
    clock.now += TAKE_OVER_EVERY_S
    readers[1].refresh()
    assert readers[1].role == "writer"
    readers[1].close()


def test_a_place_that_cannot_be_taken_leaves_a_reader_and_is_told_once(
    directory: Path, other: Callable[..., Other]
) -> None:
    writer, clock = other(), Clock()
    damage: list[str] = []
    reader = open_cache(directory, clock=clock, on_damage=damage.append)
    folder = arenas(directory)[0].parent
    writer.kill()
    shutil.rmtree(folder)
    folder.write_text("in the way")
    for _ in range(3):
        clock.now += TAKE_OVER_EVERY_S
        reader.refresh()
    assert (reader.role, len(damage)) == ("reader", 1)
    fill(reader, 5)
    reader.refresh()
    assert all(check(reader, number) for number in range(5))
    reader.close()


def test_an_error_that_passes_leaves_a_reader_that_follows_and_takes_over_later(
    directory: Path, other: Callable[..., Other], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, clock = other(), Clock()
    writer.fill(0, 10)
    damage: list[str] = []
    reader = open_cache(directory, clock=clock, on_damage=damage.append)

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for told in (1, 2):
        monkeypatch.setattr(fcntl, "flock", no_locks)
        for _ in range(3):
            clock.now += TAKE_OVER_EVERY_S
            reader.refresh()
        assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors
        monkeypatch.undo()
        writer.fill(10 * told, 10)
        clock.now += TAKE_OVER_EVERY_S
        reader.refresh()
        assert (reader.role, len(damage)) == ("reader", told)
        assert all(check(reader, number) for number in range(10 * told + 10))
    writer.kill()
    clock.now += TAKE_OVER_EVERY_S
    reader.refresh()
    assert reader.role == "writer"
    reader.close()


def test_the_lock_of_a_folder_that_is_removed_at_that_moment_is_none(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = fcntl.flock

    def too_late(descriptor: int, how: int) -> None:
        shutil.rmtree(directory)
        locked(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", too_late)
    assert token_arena.lock(directory) is None


@pytest.mark.parametrize("how", ["truncated", "removed", "replaced by another size"])
def test_a_reader_lets_go_of_a_file_that_shrinks_or_goes(
    directory: Path, other: Callable[..., Other], how: str
) -> None:
    writer = other()
    writer.fill(0, 50)
    reader = open_cache(directory)
    assert check(reader, 0)
    if how == "replaced by another size":
        writer.kill()
        following = other(1 << 14)
        assert following.role == "writer"
        assert all(check(reader, number) for number in range(50)), "the old file is read to its end"
        following.fill(100, 10)
    for file in arenas(directory):
        if how == "truncated":
            os.truncate(file, 4096)
        elif how == "removed":
            file.unlink()
    reader.refresh()
    assert check(reader, 100) == (how == "replaced by another size")
    for number in range(50):
        check(reader, number)
    fill(reader, 5, start=200)
    assert check(reader, 204)
    reader.close()


@pytest.mark.parametrize("at", [0, 8, 20, 56, 64, 68, 100])
def test_a_byte_that_flips_costs_entries_and_never_gives_wrong_ids(
    directory: Path, other: Callable[..., Other], at: int
) -> None:
    writer = other()
    writer.fill(0, 50)
    early = open_cache(directory)
    with arenas(directory)[0].open("r+b") as file:
        file.seek(at)
        value = file.read(1)[0]
        file.seek(at)
        file.write(bytes([value ^ 0x10]))
    late = open_cache(directory)
    for reader in (early, late):
        reader.refresh()
        assert sum(check(reader, number) for number in range(50)) < 50
        fill(reader, 50)
        assert all(check(reader, number) for number in range(50))
        reader.close()


def test_a_reader_that_is_there_before_the_writers_files_finds_them_later(directory: Path) -> None:
    probe = open_cache(directory)
    probe.close()
    files = arenas(directory)
    for file in files:
        file.unlink()
    lock = token_arena.lock(files[0].parent)
    assert lock is not None
    reader = open_cache(directory)
    assert (reader.role, len(reader)) == ("reader", 0)
    os.close(lock)
    writer = open_cache(directory)
    fill(writer, 10)
    reader.refresh()
    assert all(check(reader, number) for number in range(10))
    writer.close()
    reader.close()


@settings(max_examples=80)
@given(done=st.integers(0, 20), stop=st.integers(0, 200), length=st.integers(1, 40))
def test_an_append_that_stops_anywhere_is_whole_or_not_there(done: int, stop: int, length: int) -> None:
    import numpy as np

    whole = Arena(token_arena.in_memory(8192), 2, bytes(32))
    whole.clear(3)
    for number in range(done):
        whole.append(key(number), np.arange(5, dtype="<u2").tobytes(), 0)
    before, start = bytes(whole.mapped.buffer), whole.end
    whole.append(key(99), np.arange(length, dtype="<u2").tobytes(), 1)
    after = bytes(whole.mapped.buffer)
    # As the writer does it: first what follows the checksum, then the checksum.
    order = [*range(start + 4, whole.end), *range(start, start + 4)]
    torn = bytearray(before)
    for at in order[: stop % (len(order) + 1)]:
        torn[at] = after[at]
    reader = Arena(token_arena.in_memory(8192), 2, bytes(32))
    reader.mapped.buffer[:] = bytes(torn)
    assert reader.header() == 3
    reader.begin(3)
    found = reader.scan(1000)
    assert len(found) == done + (torn == after)
    whole.close()
    reader.close()
