"""Children are started, awaited, stopped in order, and never outlive their supervisor."""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sluice.demo.loopback import free_port
from sluice.demo.processes import ManagedProcess, ProcessFailed, Supervisor, ending
from tests.brokers.clients import TIMEOUT_S, eventually

# Each says when its signal handlers are set, so that no test races with its start.
OBEDIENT = "import signal; print('up', flush=True); signal.pause()"
# Starts up until it is told to go on.
WAITING = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
print("starting up", flush=True)
signal.sigwait({signal.SIGUSR1})
"""
STUBBORN = "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True)\nwhile True: signal.pause()"
GRANDPARENT = "import subprocess, sys; c = subprocess.Popen(['sleep', '300']); print(c.pid, flush=True); c.wait()"


def start(supervisor: Supervisor, name: str, code: str) -> ManagedProcess:
    process = supervisor.spawn(name, [sys.executable, "-c", code], ready_line="up")
    process.wait_ready(TIMEOUT_S)
    return process


def gone(pid: int) -> Callable[[], bool]:
    """Gone, or dead and not yet collected by whoever adopted it."""

    def check() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return check


def test_a_line_says_when_it_is_ready(supervisor: Supervisor) -> None:
    process = supervisor.spawn("a", [sys.executable, "-c", WAITING + OBEDIENT], ready_line="up")
    eventually(process.log_tail, "the line before it")
    assert not process.ready()
    os.kill(process.pid, signal.SIGUSR1)
    process.wait_ready(TIMEOUT_S)
    assert process.ready()
    assert process.log_tail().splitlines() == ["starting up", "up"]


def test_a_url_says_when_it_is_ready(supervisor: Supervisor) -> None:
    port = free_port()
    statuses = [503, 503, 200]

    class Probe(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses.pop(0))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    process = supervisor.spawn("a", ["sleep", "300"], ready_url=f"http://127.0.0.1:{port}/readyz")
    assert not process.ready()
    with http.server.HTTPServer(("127.0.0.1", port), Probe) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        process.wait_ready(TIMEOUT_S)
        server.shutdown()
        thread.join()
    assert statuses == []


def test_one_that_ends_too_early_is_an_error_with_the_end_of_its_log(supervisor: Supervisor) -> None:
    process = supervisor.spawn("gateway", [sys.executable, "-c", "exit('no such broker')"], ready_line="up")
    with pytest.raises(ProcessFailed, match=r"(?s)gateway ended with status 1 before it was ready.*no such broker"):
        process.wait_ready(TIMEOUT_S)
    assert supervisor.ended() == [process]


def test_one_that_is_never_ready_is_an_error_in_time(supervisor: Supervisor) -> None:
    process = supervisor.spawn("slow", ["sleep", "300"], ready_line="up")
    with pytest.raises(ProcessFailed, match=r"slow was not ready after 0.2 s"):
        process.wait_ready(0.2)


def test_a_command_that_does_not_exist_is_named(supervisor: Supervisor) -> None:
    process = supervisor.spawn("x", ["/no/such/command"])
    assert process.wait(TIMEOUT_S) == 127
    process.stop(1.0)
    assert process.log_tail() == "cannot run /no/such/command: No such file or directory"


def test_stop_asks_first_and_kills_at_the_deadline_in_the_given_order(supervisor: Supervisor) -> None:
    start(supervisor, "polite", OBEDIENT)
    start(supervisor, "stubborn", STUBBORN)
    statuses = supervisor.stop(["stubborn", "polite"], deadline_s=0.3)
    assert list(statuses.items()) == [("stubborn", -signal.SIGKILL), ("polite", -signal.SIGTERM)]
    assert supervisor.stop(["stubborn", "polite"], deadline_s=0.3) == statuses


def test_kill_reaches_grandchildren(supervisor: Supervisor) -> None:
    process = supervisor.spawn("family", [sys.executable, "-c", GRANDPARENT])
    grandchild = int(eventually(process.log_tail, "the grandchild's pid"))
    process.kill()
    assert process.returncode == -signal.SIGKILL
    eventually(gone(grandchild), "the grandchild's end")


def test_a_name_is_used_again_for_a_restart(supervisor: Supervisor) -> None:
    first = start(supervisor, "agent", OBEDIENT)
    first.kill()
    second = start(supervisor, "agent", OBEDIENT)
    assert second.pid != first.pid
    assert second.log_tail().splitlines() == ["up", "up"]


def test_a_child_outlives_the_thread_that_asked_for_it(supervisor: Supervisor) -> None:
    """The kernel ties a child to the thread that forked it; that must not be the caller's."""
    thread = threading.Thread(target=start, args=(supervisor, "a", OBEDIENT))
    thread.start()
    thread.join()
    assert supervisor.processes["a"].wait(0.3) is None


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os._exit(0)", "raise SystemExit"])
def test_no_child_outlives_its_supervisor(end: str, tmp_path: Path) -> None:
    code = f"""
import os, pathlib
from sluice.demo.processes import Supervisor
supervisor = Supervisor(pathlib.Path({str(tmp_path)!r}))
children = [supervisor.spawn(str(n), ["sleep", "300"]) for n in range(3)]
for child in children:
    while not child.alive or open(f"/proc/{{child.pid}}/comm").read() != "sleep\\n": pass
print(*(child.pid for child in children), flush=True)
{end}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 3, done.stderr
    for pid in pids:
        eventually(gone(pid), f"the end of {pid}")


def test_a_flood_of_output_neither_blocks_the_child_nor_fills_the_disk(tmp_path: Path) -> None:
    with Supervisor(tmp_path, log_bytes_max=10_000) as supervisor:
        process = supervisor.spawn("loud", [sys.executable, "-c", "for n in range(200_000): print('line', n)"])
        assert process.wait(TIMEOUT_S) == 0
        process.stop(1.0)
        assert process.log_tail(1) == "line 199999"
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 10_000


def test_leaving_the_block_kills_what_still_runs(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        pid = start(supervisor, "a", STUBBORN).pid
    assert gone(pid)()


def test_ctrl_c_in_the_terminal_is_for_the_supervisor_alone(supervisor: Supervisor) -> None:
    process = start(supervisor, "a", OBEDIENT)
    assert os.getpgid(process.pid) == process.pid != os.getpgrp()
    started = time.monotonic()
    assert process.stop(TIMEOUT_S) == -signal.SIGTERM
    assert time.monotonic() - started < TIMEOUT_S / 2


def test_how_a_process_ended_is_said_in_words() -> None:
    assert [ending(status) for status in (0, 2, -9, -200, None)] == [
        "ended with status 0",
        "ended with status 2",
        "was killed by SIGKILL",
        "was killed by signal 200",
        "ended with status None",
    ]
