"""A full disk: the spool refuses, loses nothing, and drains with the help of its ballast."""

import io
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sluice.spool_examples import Item, append_until_refused, events, everything, open_spool

MIB = 1024 * 1024


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(mount)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_full_disk_refuses_what_it_cannot_keep_and_drains_completely(small_disk: Path) -> None:
    log = io.StringIO()
    with open_spool(small_disk / "s", log, ballast_bytes=3 * MIB) as spool:
        assert spool.status().ballast
        refused = append_until_refused(spool, lambda n: Item(f"i{n}", size_bytes=100_000), lambda n: b"%d" % n)
        assert "the disk is full" in str(refused)
        accepted = spool.next_sequence
        # Somebody else takes the rest: not a byte is free.
        _fill_up(small_disk)
        assert spool.cursors() == {"c": b"%d" % (accepted - 1)}
        for item in everything(spool):
            assert not item.receipt
            spool.settle(item.spool_id, [(item.first_sequence, item.stop_sequence)])
        assert spool.empty
        assert spool.next_sequence == accepted
        (small_disk / "filler").unlink()
        # There is room in the database again, and the ballast is back.
        assert spool.append([Item("again", size_bytes=100_000)]) == accepted
        spool.settle(spool.spool_id, [(0, accepted + 1)])
        assert spool.status().ballast
    told = [e["event"] for e in events(log)]
    assert "spool_disk_full" in told
    assert "spool_ballast_released" in told


def test_a_spool_opens_on_a_full_disk(small_disk: Path) -> None:
    with open_spool(small_disk / "s", ballast_bytes=3 * MIB) as spool:
        spool.append([Item(f"i{n}", size_bytes=100_000) for n in range(20)])
    _fill_up(small_disk)
    with open_spool(small_disk / "s", ballast_bytes=3 * MIB) as spool:
        for item in everything(spool):
            spool.settle(item.spool_id, [(item.first_sequence, item.stop_sequence)])
        assert spool.empty


def _fill_up(folder: Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as filler:
        for block in (b"x" * 65536, b"x" * 512):
            try:
                while True:
                    filler.write(block)
            except OSError:
                continue
