"""Child processes by name: started, awaited, logged, stopped in order, never orphaned.

Invariants: every child leads a process group of its own (Ctrl-C in a terminal reaches the supervisor only, and a kill
reaches grandchildren); it gets SIGKILL from the kernel when the supervisor dies, whatever the reason; its output goes
to a file of bounded size. A child that ends before it is ready, or is not ready in time, is `ProcessFailed` with the
end of its log. The kernel ties a child's life to the *thread* that forked it, so one thread of the supervisor does all
the forking and lives until the last child has ended; the methods here may be called from any thread.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from sluice.demo.bounded_log import BoundedLog, tail
from sluice.demo.launch import command_line
from sluice.errors import Permanent

LOG_BYTES_MAX: Final = 8 << 20
_POLL_S: Final = 0.05
_PROBE_TIMEOUT_S: Final = 1.0
_READ_BYTES: Final = 64 * 1024
# The ready line comes first; a child that never prints it must not make us keep its output.
_READY_SEARCH_BYTES_MAX: Final = 64 * 1024


class ProcessFailed(Permanent):
    """A child ended when it should not have, or was not ready in time. Its text holds the end of the log."""


def ending(status: int | None) -> str:
    """How a process ended, in words: `ended with status 2`, `was killed by SIGKILL`."""
    if status is None or status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


class ManagedProcess:
    """One child. Made by `Supervisor.spawn`; all methods may be called from any thread."""

    def __init__(
        self,
        name: str,
        popen: subprocess.Popen[bytes],
        log: BoundedLog,
        *,
        ready_url: str | None = None,
        ready_line: str | None = None,
        ready_check: Callable[[], bool] | None = None,
    ) -> None:
        self.name = name
        self.log_path = log.path
        self._ready_url = ready_url
        self._ready_check = ready_check
        self._popen = popen
        self._log = log
        self._ready_line = ready_line.encode() if ready_line is not None else None
        self._line_seen = threading.Event()
        self._reap = threading.Lock()
        self._pump = threading.Thread(target=self._copy_output, name=f"log-{name}", daemon=True)
        self._pump.start()

    @property
    def pid(self) -> int:
        """Process id; also of its group."""
        return self._popen.pid

    @property
    def stdin(self) -> IO[bytes]:
        """The pipe to its standard input, unbuffered; for one that was spawned with `stdin=PIPE`."""
        assert self._popen.stdin is not None, "spawned with stdin=PIPE"
        return self._popen.stdin

    @property
    def returncode(self) -> int | None:
        """Exit status; minus the signal's number when a signal ended it; None while it runs."""
        with self._reap:
            return self._popen.poll()

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.returncode is None

    def ready(self) -> bool:
        """Whether it can do its work now: its line was printed, its URL answers 200, its check holds."""
        if not self.alive or (self._ready_line is not None and not self._line_seen.is_set()):
            return False
        if self._ready_url is not None and not _answers_ok(self._ready_url):
            return False
        return self._ready_check is None or self._ready_check()

    def wait_ready(self, timeout_s: float) -> None:
        """Returns when it is ready.

        Raises:
            ProcessFailed: when it ended, or was not ready in time.
        """
        deadline = time.monotonic() + timeout_s
        pause = threading.Event()
        while not self.ready():
            if not self.alive:
                raise self.failure(f"{ending(self.returncode)} before it was ready")
            if time.monotonic() > deadline:
                raise self.failure(f"was not ready after {timeout_s:g} s")
            pause.wait(_POLL_S)

    def wait(self, timeout_s: float) -> int | None:
        """Waits for its end, at most `timeout_s` seconds; the exit status, or None when it still runs."""
        deadline = time.monotonic() + timeout_s
        pause = threading.Event()
        while (status := self.returncode) is None and time.monotonic() < deadline:
            pause.wait(min(_POLL_S, timeout_s))
        return status

    def terminate(self) -> None:
        """Asks it to end (SIGTERM). Grandchildren are its own business."""
        with self._reap:
            if self._popen.poll() is None:
                self._popen.terminate()

    def kill(self) -> None:
        """Kills it and its group (SIGKILL) and waits until it is gone. Nothing happens when it is gone already."""
        with self._reap:
            # Not reaped yet, so the id cannot have passed to a stranger.
            if self._popen.poll() is None:
                os.killpg(self.pid, signal.SIGKILL)
                self._popen.wait()
        self._finish()

    def stop(self, deadline_s: float) -> int:
        """SIGTERM; SIGKILL after `deadline_s` seconds. Returns the exit status (-9 when it had to be killed)."""
        self.terminate()
        if self.wait(deadline_s) is None:
            self.kill()
        self._finish()
        status = self.returncode
        assert status is not None, "it was waited for"
        return status

    def log_tail(self, lines_max: int = 20) -> str:
        """The end of its output."""
        return tail(self.log_path, lines_max)

    def failure(self, what: str) -> ProcessFailed:
        """An error that says what happened, with the end of the log."""
        if not self.alive:
            self._finish()
        # What happened comes last, too: the log may fill the screen.
        return ProcessFailed(
            f"{self.name} {what}; the end of {self.log_path}:\n{self.log_tail()}\nsluice: {self.name} {what}"
        )

    def _finish(self) -> None:
        # A grandchild that outlived it may hold the pipe open: its output is not worth waiting for.
        self._pump.join(timeout=1.0)
        if self._popen.stdin is not None:
            with contextlib.suppress(OSError):
                self._popen.stdin.close()

    def _copy_output(self) -> None:
        pipe = self._popen.stdout
        assert pipe is not None, "spawned with a pipe"
        head = b""
        with pipe:
            while chunk := os.read(pipe.fileno(), _READ_BYTES):
                self._log.write(chunk)
                if self._ready_line is not None and not self._line_seen.is_set():
                    head = (head + chunk)[:_READY_SEARCH_BYTES_MAX]
                    if self._ready_line in head.splitlines():
                        self._line_seen.set()
        self._log.close()


class Supervisor:
    """Owns child processes; leaving its `with` block kills whatever still runs.

    Args:
        log_dir: a file `NAME.log` per child; made when it is missing.
        log_bytes_max: per child.
    """

    def __init__(self, log_dir: Path, log_bytes_max: int = LOG_BYTES_MAX) -> None:
        self.processes: dict[str, ManagedProcess] = {}
        self._log_dir = log_dir
        self._log_bytes_max = log_bytes_max
        self._forker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forker")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def spawn(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        inherit: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        ready_url: str | None = None,
        ready_line: str | None = None,
        ready_check: Callable[[], bool] | None = None,
        stdin: int = subprocess.DEVNULL,
    ) -> ManagedProcess:
        """Starts a child; a name may be used again once its process has ended (a restart).

        Args:
            name: for messages and the log file.
            argv: the command and its arguments.
            env: added to what is inherited.
            inherit: this process's environment when None.
            cwd: working folder; this process's by default.
            ready_url: answers 200 when the child is ready (`http://127.0.0.1:PORT/readyz`).
            ready_line: a whole line of its output that says so.
            ready_check: says so itself, for what has neither.
            stdin: `subprocess.PIPE` to write to it (`ManagedProcess.stdin`); nothing to read by default.
        """
        previous = self.processes.get(name)
        assert previous is None or not previous.alive, f"{name} still runs"
        self._log_dir.mkdir(parents=True, exist_ok=True)
        log = BoundedLog(self._log_dir / f"{name}.log", self._log_bytes_max)
        popen = self._forker.submit(
            _fork, argv, {**(os.environ if inherit is None else inherit), **(env or {})}, cwd, stdin
        ).result()
        process = ManagedProcess(name, popen, log, ready_url=ready_url, ready_line=ready_line, ready_check=ready_check)
        self.processes[name] = process
        return process

    def ended(self) -> list[ManagedProcess]:
        """Those that do not run any more."""
        return [process for process in self.processes.values() if not process.alive]

    def stop(self, order: Sequence[str], deadline_s: float) -> dict[str, int]:
        """Stops these one after the other (sources first), each within `deadline_s` seconds, then by force.

        Returns:
            The exit status of each; -9 for one that did not end in time.
        """
        return {name: self.processes[name].stop(deadline_s) for name in order if name in self.processes}

    def close(self) -> None:
        """Kills whatever still runs, the last started first."""
        for process in reversed(self.processes.values()):
            process.kill()
        self._forker.shutdown()


def _fork(argv: Sequence[str], env: Mapping[str, str], cwd: Path | None, stdin: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command_line(list(argv)),
        env=env,
        cwd=cwd,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        process_group=0,
    )


def _answers_ok(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=_PROBE_TIMEOUT_S) as answer:  # noqa: S310 - an address of our own
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
