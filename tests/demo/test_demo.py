"""The command as a user runs it: one run, and every promise checked on what it printed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

from tests.brokers.clients import eventually

RUN_TIMEOUT_S = 300.0
KEYS = {
    "records_accepted",
    "records_in_lake",
    "records_kept_on_site",
    "records_quarantined",
    "records_expired",
    "duplicates_in_lake",
    "results",
    "feed_records",
    "canaries_planted",
    "canaries_found_outside_site",
    "ledger_balanced",
    "seconds",
}
pytestmark = pytest.mark.timeout(RUN_TIMEOUT_S + 30)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "sluice", "demo", *arguments]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("demo") / "run"
    log = folder.parent / "app.log"
    log.write_text("".join(f"request {i} took {i * 7 % 40} ms, status ok\n" for i in range(300)))
    argv = command("--seconds", "10", "--json", "--dir", str(folder), "--tail", str(log), "--seed", "1")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False)
    return done, folder


@pytest.fixture(scope="module")
def numbers(run: tuple[subprocess.CompletedProcess[str], Path]) -> dict[str, Any]:
    done, _ = run
    assert done.returncode == 0, f"{done.stderr}\n{done.stdout}"
    assert len(done.stdout.splitlines()) == 1, "one JSON object and nothing else"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_it_prints_one_json_object_with_the_promised_keys(numbers: dict[str, Any]) -> None:
    assert numbers.keys() >= KEYS
    assert numbers["problems"] == []


def test_every_record_is_accounted_for(numbers: dict[str, Any]) -> None:
    assert numbers["ledger_balanced"] is True
    fates = ("in_lake", "kept_on_site", "quarantined", "expired", "dropped", "in_spool")
    assert numbers["records_accepted"] == sum(numbers[f"records_{fate}"] for fate in fates)
    assert numbers["records_in_spool"] == numbers["records_expired"] == numbers["records_quarantined"] == 0
    assert numbers["records_in_lake"] > 300, "the log file and the host's metrics"


def test_no_row_is_there_twice(numbers: dict[str, Any]) -> None:
    assert numbers["duplicates_in_lake"] == 0


def test_no_personal_data_left_the_site_and_the_search_can_see(numbers: dict[str, Any]) -> None:
    assert numbers["canaries_planted"] > 100
    assert numbers["canaries_found_outside_site"] == 0
    assert numbers["records_kept_on_site"] >= numbers["canaries_planted"]
    assert numbers["beacons_found"] == numbers["beacons_planted"] > 100


def test_records_and_results_reached_the_client(numbers: dict[str, Any]) -> None:
    assert numbers["feed_records"] == numbers["records_in_lake"]
    assert numbers["results"] == numbers["results_in_lake"] > 300


def test_the_agent_stays_small(numbers: dict[str, Any]) -> None:
    assert 10e6 < numbers["agent_rss_bytes_max"] < 60e6


def test_every_line_of_the_file_is_a_row(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    from sluice.demo.lake_view import RECORDS, LakeView

    texts = LakeView(run[1] / "lake").query(RECORDS, "text, count(*)", "where stream = 'logs' group by text")
    assert dict(texts) == {f"request {i} took {i * 7 % 40} ms, status ok": 1 for i in range(300)}


def test_what_it_kept_can_be_looked_at_with_the_commands(
    run: tuple[subprocess.CompletedProcess[str], Path], numbers: dict[str, Any]
) -> None:
    argv = [sys.executable, "-m", "sluice", "ledger", "--lake", str(run[1] / "lake"), "--json"]
    books = json.loads(subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert books["accepted"] == numbers["records_accepted"]
    for part in ("edge", "gateway", "central"):
        check = [sys.executable, "-m", "sluice", part, "--config", str(run[1] / f"{part}.toml"), "--check"]
        subprocess.run(check, capture_output=True, timeout=60, check=True)


def start(*arguments: str, cwd: Path) -> tuple[subprocess.Popen[str], list[str]]:
    """A demo in the background, and its lines on stderr as they come."""
    process = subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        env={**os.environ, "TMPDIR": str(cwd)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines: list[str] = []
    assert process.stderr is not None
    threading.Thread(target=_collect, args=(process.stderr, lines), daemon=True).start()
    return process, lines


def _collect(pipe: IO[str], lines: list[str]) -> None:
    with contextlib.suppress(ValueError):  # closed at the end of the test
        lines.extend(pipe)


def finish(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(10)
    for pipe in (process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_a_part_that_dies_ends_the_run_with_the_end_of_its_log_and_no_orphan(tmp_path: Path) -> None:
    process, lines = start("--seconds", "60", cwd=tmp_path)
    try:
        brokers = eventually(lambda: children(process), "the brokers run", 30.0)
        eventually(lambda: any("gateway and central" in line for line in lines), "gateway and central start", 60.0)
        parts = eventually(lambda: _of(children(process), "central"), "central runs", 60.0)
        parts[0].kill()
        assert process.wait(30) == 1
        eventually(lambda: any("central was killed by SIGKILL" in line for line in lines), f"says so: {lines}")
        eventually(lambda: not any(map(_is_running, brokers)), "no orphan")
    finally:
        finish(process)


def test_ctrl_c_before_records_flow_ends_it_and_a_killed_demo_leaves_no_orphan(tmp_path: Path) -> None:
    process, lines = start("--keep", cwd=tmp_path)
    eventually(lambda: any("gateway and central" in line for line in lines), "gateway and central start", 60.0)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    finish(process)
    process, lines = start("--keep", cwd=tmp_path)
    eventually(lambda: any("gateway and central" in line for line in lines), "gateway and central start", 60.0)
    started = children(process)
    assert started
    finish(process)  # SIGKILL
    eventually(lambda: not any(map(_is_running, started)), "no orphan", 15.0)


def test_a_second_ctrl_c_aborts_the_drain_and_leaves_nothing_behind(tmp_path: Path) -> None:
    process, lines = start("--json", cwd=tmp_path)
    try:
        eventually(lambda: any("records flow" in line for line in lines), "records flow", RUN_TIMEOUT_S)
        started = children(process)
        process.send_signal(signal.SIGINT)
        eventually(lambda: any("draining" in line for line in lines), "it drains", 10.0)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        eventually(lambda: not any(map(_is_running, started)), "no orphan", 15.0)
        assert any("aborted" in line for line in lines)
    finally:
        finish(process)


def test_a_folder_of_someone_else_is_not_emptied(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    done = subprocess.run(command("--dir", str(tmp_path)), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "no demo made it" in done.stderr
    assert precious.read_text() == "mine"


def test_a_tail_pattern_without_a_file_is_named(tmp_path: Path) -> None:
    argv = command("--tail", str(tmp_path / "*.log"))
    begun = time.monotonic()
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "*.log: no file that can be read" in done.stderr
    assert time.monotonic() - begun < 20, "before anything is started"


def _of(processes: list[psutil.Process], part: str) -> list[psutil.Process]:
    return [p for p in processes if _is_running(p) and f"{part}.toml" in " ".join(p.cmdline())]


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
