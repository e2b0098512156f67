"""The file of what streams usually say: private, whole or not there, and never a reason to stop."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config import CacheConfig, NoveltyConfig
from engine.novelty import Novelty
from engine.novelty_file import NAME, STALE_S, NoveltyFile
from tests.engine.test_novelty import BASIS, WIDTH, usual

SETTINGS = NoveltyConfig(streams_max=4, centroids_max=8)


class Kept:
    """A novelty with its file, and what was told of it."""

    def __init__(self, directory: Path, **caches: Any) -> None:
        self.now = 0.0
        self.damage: list[str] = []
        self.novelty = Novelty(SETTINGS, WIDTH, "model")
        config = CacheConfig(directory=str(directory), **caches)
        self.file = NoveltyFile(config, self.novelty, self.damage.append, clock=lambda: self.now)

    def save(self) -> None:
        self.file.write(self.file.pack())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "a" / "caches"


def saved(directory: Path) -> Kept:
    kept = Kept(directory)
    kept.novelty.read("s", usual(100))
    kept.save()
    return kept


def test_what_was_saved_is_known_again_and_nobody_else_may_read_it(directory: Path) -> None:
    first = saved(directory)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / NAME).stat().st_mode & 0o777 == 0o600
    again = Kept(directory)
    again.file.load()
    assert again.novelty.read("s", [BASIS[9]]) == first.novelty.read("s", [BASIS[9]])
    assert first.damage == again.damage == []


def test_without_a_file_all_streams_are_new_and_nothing_is_told(directory: Path) -> None:
    kept = Kept(directory)
    kept.file.load()
    assert (len(kept.novelty), kept.damage, kept.file.changed) == (0, [], False)
    assert not directory.exists()


def test_it_is_due_when_there_is_something_new_and_the_time_has_come(directory: Path) -> None:
    kept = Kept(directory, novelty_save_s=60)
    kept.now = 100
    assert not kept.file.due
    kept.novelty.read("s", usual(1))
    assert kept.file.due
    kept.save()
    kept.novelty.read("s", usual(1))
    kept.now = 159
    assert (kept.file.changed, kept.file.due) == (True, False)
    kept.now = 160
    assert kept.file.due


def _fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _huge(file: Path) -> None:
    os.truncate(file, 1 << 40)


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda file: file.write_bytes(b""), "damaged"),
        (lambda file: file.write_bytes(file.read_bytes()[:-7]), "damaged"),
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), "damaged"),
        (_huge, "no memory of streams"),
        (_fifo, "no memory of streams"),
        (_directory, "no memory of streams"),
    ],
)
def test_a_file_that_is_not_ours_is_told_and_not_used(directory: Path, harm: Callable[[Path], Any], why: str) -> None:
    saved(directory)
    harm(directory / NAME)
    again = Kept(directory)
    again.file.load()
    assert len(again.novelty) == 0
    (told,) = again.damage
    assert why in told
    assert str(directory / NAME) in told


def test_a_disk_that_is_full_leaves_the_file_as_it_was(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = saved(directory)
    before = (directory / NAME).read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kept.novelty.read("t", usual(10))
    monkeypatch.setattr(os, "fsync", full)
    kept.save()
    assert "No space left on device" in kept.damage[0]
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == {NAME: before}
    assert kept.file.changed, "it is tried again"
    monkeypatch.undo()
    kept.save()
    assert not kept.file.changed
    assert (directory / NAME).read_bytes() == kept.file.pack() != before


def test_a_directory_that_cannot_be_made_is_told_at_every_saving(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    kept = Kept(tmp_path / "file")
    kept.file.load()
    kept.novelty.read("s", usual(10))
    kept.save()
    assert len(kept.damage) == 2
    assert "cannot be written" in kept.damage[1]


def test_what_a_killed_process_left_half_written_is_removed_but_not_what_another_one_is_writing(
    directory: Path,
) -> None:
    saved(directory)
    old, fresh = directory / f"{NAME}-old", directory / f"{NAME}-fresh"
    for file in (old, fresh):
        file.write_bytes(b"half")
    os.utime(old, (0, old.stat().st_mtime - STALE_S - 1))
    Kept(directory).file.load()
    assert sorted(directory.iterdir()) == [directory / NAME, fresh]


@pytest.mark.parametrize("skip", [("s",), ("*",)])
def test_what_is_half_written_leaves_at_once_where_streams_are_skipped(directory: Path, skip: tuple[str, ...]) -> None:
    saved(directory)
    (directory / f"{NAME}-fresh").write_bytes(b"half")
    Kept(directory, skip_streams=skip).file.load()
    assert set(directory.iterdir()) <= {directory / NAME}


@pytest.mark.parametrize(("skip", "names"), [(("s", "x"), {"t"}), (("x",), {"s", "t"}), (("*",), None)])
def test_a_stream_that_is_skipped_now_leaves_the_file_at_once(
    directory: Path, skip: tuple[str, ...], names: set[str] | None
) -> None:
    kept = Kept(directory)
    for stream in ("s", "t"):
        kept.novelty.read(stream, usual(10))
    kept.save()
    again = Kept(directory, skip_streams=skip)
    again.file.load()
    assert (set(again.novelty._streams), again.damage) == (names or set(), [])
    assert (directory / NAME).exists() == (names is not None)
    if names is not None:
        third = Kept(directory)
        third.file.load()
        assert set(third.novelty._streams) == names
    again.file.load()
    assert again.damage == []


def test_a_file_of_another_model_is_emptied_when_streams_are_skipped_now(directory: Path) -> None:
    saved(directory)
    content = (directory / NAME).read_bytes()
    for skip in ((), ("s",)):
        other = Kept(directory, skip_streams=skip)
        other.novelty._space = "another model"
        other.file.load()
        assert "of another model" in other.damage[0]
        assert ((directory / NAME).read_bytes() == content) == (not skip)


def test_what_is_outdated_is_saved_although_nothing_is_new(directory: Path) -> None:
    kept = Kept(directory)
    kept.file.outdate()
    assert kept.file.changed
    kept.save()
    assert not kept.file.changed


def test_a_skipped_stream_that_could_not_be_removed_is_removed_at_the_next_saving(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saved(directory)
    again = Kept(directory, skip_streams=("s",))
    monkeypatch.setattr(os, "fsync", full)
    again.file.load()
    assert (len(again.damage), again.file.changed) == (1, True)
