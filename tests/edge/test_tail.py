"""`tail` neither loses nor repeats a line: through growth, rotation of both kinds, truncation and restarts."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.config import TailConfig
from edge.sources.follow import FollowedFile
from edge.sources.tail import TailSource
from tests.edge.source_examples import Bench


def tail(bench: Bench, folder: Path, **settings: object) -> TailSource:
    defaults = {"stream": "logs", "paths": (str(folder / "*.log"),), "poll_interval_s": 0.01, "rotate_wait_s": 0.0}
    return TailSource(TailConfig(**(defaults | settings)), bench.context)  # type: ignore[arg-type]


async def idle(bench: Bench, source: TailSource) -> None:
    """Waits until the source has looked at everything and found nothing new."""
    looked = source.idle_polls
    await bench.until(lambda: source.idle_polls >= looked + 2)


async def catch_up(bench: Bench, folder: Path, **settings: object) -> None:
    """One life of the agent: reads what is there, and is stopped."""
    source = tail(bench, folder, **settings)
    task = asyncio.create_task(bench.run(source))
    await idle(bench, source)
    source.stop()
    await task


async def test_lines_arrive_in_order_with_the_file_they_are_from(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("one\ntwo\r\n\nfour\n")
    bench = Bench()
    await bench.run(tail(bench, tmp_path, follow=False))
    assert bench.texts == ["one", "two", "", "four"]
    assert bench.records[0].labels == {"file": str(tmp_path / "a.log")}


async def test_a_last_line_without_an_end_waits_until_it_has_one(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("one\nhal")
    bench = Bench()
    source = tail(bench, tmp_path)
    task = asyncio.create_task(bench.run(source, lambda: len(bench.records) >= 2))
    await bench.until(lambda: bench.records)
    assert bench.texts == ["one"]
    with log.open("a") as file:
        file.write("f\n")
    await task
    assert bench.texts == ["one", "half"]


async def test_it_is_a_line_when_nothing_more_can_come(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("one\nhalf")
    bench = Bench()
    await bench.run(tail(bench, tmp_path, follow=False))
    await bench.run(tail(bench, tmp_path, follow=False))
    assert bench.texts == ["one", "half"]


async def test_a_restart_goes_on_behind_the_last_stored_line(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    bench = Bench()
    for life in range(4):
        with log.open("a") as file:
            file.write(f"{life}a\n{life}b\n")
        await bench.run(tail(bench, tmp_path, follow=False))
    assert bench.texts == [f"{life}{x}" for life in range(4) for x in "ab"]


async def test_what_was_not_stored_is_delivered_again(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("one\ntwo\n")
    bench = Bench()
    async for _ in tail(bench, tmp_path, follow=False).deliveries():
        pass
    await bench.run(tail(bench, tmp_path, follow=False))
    assert bench.texts == ["one", "two"]


async def test_rotation_by_rename_while_running(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("1\n2\n")
    bench = Bench()
    source = tail(bench, tmp_path, rotate_wait_s=0.05)
    task = asyncio.create_task(bench.run(source, lambda: len(bench.records) >= 6))
    await bench.until(lambda: len(bench.records) >= 2)
    writer = log.open("a")
    log.rename(tmp_path / "a.log.1")
    log.write_text("5\n6\n")
    # Whoever had it open goes on writing to the old file for a while.
    writer.write("3\n4\n")
    writer.close()
    await task
    assert sorted(bench.texts) == list("123456")
    assert bench.texts.index("3") < bench.texts.index("4")


async def test_rotation_by_rename_while_stopped(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("1\n2\n")
    bench = Bench()
    await catch_up(bench, tmp_path)
    with log.open("a") as file:
        file.write("3\nhalf")
    log.rename(tmp_path / "a.log.1")
    log.write_text("4\n")
    await catch_up(bench, tmp_path)
    assert sorted(bench.texts) == ["1", "2", "3", "4", "half"]
    # The old file's story has ended: its place is forgotten.
    assert len(bench.cursors) == 1


async def test_a_file_that_vanished_is_said_to_have(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("1\n")
    bench = Bench()
    await catch_up(bench, tmp_path)
    # In this order, or the new file may get the old one's inode.
    (tmp_path / "b.log").write_text("2\n")
    log.unlink()
    await catch_up(bench, tmp_path)
    assert bench.texts == ["1", "2"]
    assert "tail_gone" in [event["event"] for event in bench.events()]


async def test_places_of_vanished_files_are_bounded(tmp_path: Path) -> None:
    bench = Bench()
    for life in range(4):
        log = tmp_path / f"{life}.log"
        log.write_text(f"{life}\n")
        await catch_up(bench, tmp_path, files_max=1)
        log.rename(tmp_path / f"kept.{life}")  # its inode must not be used again
    (tmp_path / "last.log").write_text("last\n")
    await catch_up(bench, tmp_path, files_max=1)
    assert bench.texts == ["0", "1", "2", "3", "last"]
    assert len(bench.cursors) <= 3


async def test_a_file_that_is_away_at_a_start_goes_on_where_it_was(tmp_path: Path) -> None:
    log, elsewhere = tmp_path / "a.log", tmp_path / "away"
    log.write_text("1\n2\n")
    bench = Bench()
    await catch_up(bench, tmp_path)
    log.rename(elsewhere)
    await catch_up(bench, tmp_path)
    elsewhere.rename(log)
    with log.open("a") as file:
        file.write("3\n")
    await catch_up(bench, tmp_path)
    assert bench.texts == ["1", "2", "3"]


async def test_a_file_for_which_there_is_no_room_keeps_its_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.log").write_text(f"{name}1\n")
    bench = Bench()
    await catch_up(bench, tmp_path)
    await catch_up(bench, tmp_path, files_max=1)
    await catch_up(bench, tmp_path)
    assert sorted(bench.texts) == ["a1", "b1"]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("regrown", ["", "new 1\n", "new line that is longer than what was there before\n" * 3])
async def test_copy_truncate(tmp_path: Path, restart: bool, regrown: str) -> None:
    log = tmp_path / "a.log"
    log.write_text("old 1\nold 2\n")
    bench = Bench()
    if restart:
        await catch_up(bench, tmp_path)
    source = tail(bench, tmp_path)
    expected = ["old 1", "old 2", *regrown.splitlines(), "last"]
    task = asyncio.create_task(bench.run(source, lambda: bench.texts == expected))
    await bench.until(lambda: len(bench.records) >= 2)
    shutil.copy(log, tmp_path / "a.log.1")
    os.truncate(log, 0)
    with log.open("a") as file:
        file.write(regrown)
    await idle(bench, source)
    with log.open("a") as file:
        file.write("last\n")
    await task
    assert bench.texts == expected


async def test_rotated_copies_are_not_read_again(tmp_path: Path) -> None:
    for name in ("a.log", "a.log.1", "a.log.2.gz", "a.log.old"):
        (tmp_path / name).write_text(f"{name}\n")
    bench = Bench()
    await bench.run(tail(bench, tmp_path, paths=(str(tmp_path / "a.log*"),), follow=False))
    assert bench.texts == ["a.log"]
    await bench.run(tail(bench, tmp_path, paths=(str(tmp_path / "a.log.1"),), follow=False))
    assert bench.texts == ["a.log", "a.log.1"]


async def test_it_may_begin_at_the_end(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("old\nha")
    bench = Bench()
    source = tail(bench, tmp_path, start_at="end")
    task = asyncio.create_task(bench.run(source, lambda: len(bench.records) >= 3))
    await idle(bench, source)
    with log.open("a") as file:
        file.write("lf\nnew\n")
    # A file that appears later is new altogether.
    (tmp_path / "b.log").write_text("b\n")
    await task
    assert sorted(bench.texts) == ["b", "half", "new"]


async def test_what_was_skipped_stays_skipped_after_a_restart(tmp_path: Path) -> None:
    for name in ("busy", "quiet"):
        (tmp_path / f"{name}.log").write_text(f"old {name}\n")
    bench = Bench()
    source = tail(bench, tmp_path, start_at="end")
    task = asyncio.create_task(bench.run(source, lambda: bench.records))
    await idle(bench, source)
    with (tmp_path / "busy.log").open("a") as file:
        file.write("new\n")
    await task
    await catch_up(bench, tmp_path, start_at="end")
    assert bench.texts == ["new"]


async def test_what_does_not_decode_is_visible(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_bytes(b"a\xffb\n\xe4\n")
    bench = Bench()
    await bench.run(tail(bench, tmp_path, follow=False))
    assert bench.texts == ["a\ufffdb", "\ufffd"]
    await bench.run(tail(bench, tmp_path, name="latin", follow=False, encoding="latin-1"))
    assert bench.texts[2:] == ["aÿb", "ä"]


async def test_a_long_line_is_cut_into_parts_that_keep_the_limit(tmp_path: Path) -> None:
    line = "äöü€" * 100 + "x" * 50
    (tmp_path / "a.log").write_text(f"short\n{line}\nend\n")
    bench = Bench(text_bytes_max=60)
    await bench.run(tail(bench, tmp_path, follow=False))
    parts = bench.records[1:-1]
    assert "".join(record.text for record in parts) == line
    assert [record.labels["part"] for record in parts] == [str(n + 1) for n in range(len(parts))]
    assert all(len(record.text.encode()) <= 60 for record in parts)
    assert [bench.texts[0], bench.texts[-1]] == ["short", "end"]
    assert "part" not in bench.records[-1].labels


async def test_garbage_without_an_end_is_read_in_bounded_parts_too(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_bytes(b"\xff" * 1000)
    bench = Bench(text_bytes_max=90)
    await bench.run(tail(bench, tmp_path, follow=False))
    assert "".join(bench.texts) == "\ufffd" * 1000


async def test_the_number_of_files_is_bounded_and_told(tmp_path: Path) -> None:
    for n in range(5):
        (tmp_path / f"{n}.log").write_text(f"{n}\n")
    bench = Bench()
    await bench.run(tail(bench, tmp_path, follow=False, files_max=3))
    assert bench.texts == ["0", "1", "2"]
    assert [event["file"] for event in bench.events() if event["event"] == "tail_too_many"] == [
        str(tmp_path / "3.log"),
        str(tmp_path / "4.log"),
    ]


@given(
    lines=st.lists(st.binary(max_size=40).filter(lambda line: b"\n" not in line), max_size=12),
    cuts=st.lists(st.integers(0, 500), max_size=6),
    limit=st.integers(8, 30),
)
def test_however_a_file_grows_its_lines_come_out_whole(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], cuts: list[int], limit: int
) -> None:
    content = b"".join(line + b"\n" for line in lines)
    path = tmp_path_factory.mktemp("f") / "a.log"
    path.write_bytes(b"")
    got: list[bytes] = []
    current = b""
    place = None
    at = 0
    for cut in [*sorted(c for c in cuts if c < len(content)), len(content)]:
        with path.open("ab") as file:
            file.write(content[at:cut])
        at = cut
        # Opened anew each time, as after a restart.
        file_ = FollowedFile(path, place, limit)
        assert not file_.check()
        while read := file_.read(16, final=False):
            for line in read:
                assert len(line.data) <= limit
                current += line.data
                if content[line.end_offset - 1 : line.end_offset] == b"\n":
                    got.append(current)
                    current = b""
        place = file_.place
        file_.close()
    assert got == lines
    assert current == b""
