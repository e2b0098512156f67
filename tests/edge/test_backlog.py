"""What `tail` reads of a file that was there before the agent: `backlog_bytes_max`."""

from pathlib import Path

import pytest

from tests.edge.source_examples import Bench
from tests.edge.test_tail import catch_up

LINES = [f"line {number}" for number in range(10)]  # 7 bytes each, with their ends


@pytest.mark.parametrize(
    ("backlog_bytes", "first"), [(1000, 0), (70, 0), (69, 1), (63, 1), (21, 7), (20, 8), (7, 9), (6, 10), (1, 10)]
)
async def test_whole_lines_within_the_limit_are_read(backlog_bytes: int, first: int, tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("".join(f"{line}\n" for line in LINES))
    bench = Bench()
    await catch_up(bench, tmp_path, backlog_bytes_max=backlog_bytes)
    assert bench.texts == LINES[first:]


async def test_what_comes_later_is_read_whole(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("".join(f"{line}\n" for line in LINES))
    bench = Bench()
    await catch_up(bench, tmp_path, backlog_bytes_max=7)
    with log.open("a") as file:
        file.write("".join(f"more {line}\n" for line in LINES))
    (tmp_path / "b.log").write_text("".join(f"{line}\n" for line in LINES))
    await catch_up(bench, tmp_path, backlog_bytes_max=7)
    more = [f"more {line}" for line in LINES]
    assert bench.texts[0] == "line 9"
    assert sorted(bench.texts[1:]) == sorted(more + LINES), "a file that appears later is read from its beginning"
