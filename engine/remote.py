"""A backend in a process of its own, driven as if it were here.

The process is started by a thread that waits for its end and for nothing else: the kernel ties the child's life to
the thread that forked it, and whoever watches learns at once that it died.

Fails: opening raises what opening in this process would (`Permanent`, `ConfigError`), or `Retryable` when the
process ended or did not answer in time. Later, `DeviceLost` once the process is gone; a process that does not
answer within `answer_s_max` is killed and counts as gone.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from engine import wire
from engine.backend import BackendInfo, DeviceLost, DeviceMemory, DeviceOutOfMemory
from sluice.errors import ConfigError, Permanent, Retryable

if TYPE_CHECKING:
    from engine.backend import Outputs, Rows

_Answer = TypeVar("_Answer", bound=wire.Answer)


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker process hosts.

    Attributes:
        opener: `module:function` that opens the backend there; see `engine.worker`.
        arguments: of the opener, plain values.
        cpus: that the process may use; none: as this process.
        start_s_max: time to open.
        answer_s_max: time for one batch.
        close_s_max: time to end when asked to; then it is killed.
    """

    opener: str
    arguments: dict[str, Any] = field(default_factory=dict)
    cpus: tuple[int, ...] = ()
    start_s_max: float = 300.0
    answer_s_max: float = 300.0
    close_s_max: float = 10.0


class RemoteBackend:
    """A backend in a worker process. Opens it; see the module's docstring.

    Args:
        spec: what it hosts.
        child: a process that was started for it; None: it starts one.
    """

    def __init__(self, spec: WorkerSpec, child: "_Child | None" = None) -> None:
        self._spec = spec
        self._child = child or _Child()
        self._closed = False
        self._tickets = count()
        try:
            ready = self._ask(wire.Open(spec.opener, spec.arguments, list(spec.cpus)), wire.Ready, spec.start_s_max)
        except DeviceLost as lost:
            self.close()
            raise Retryable(f"a worker did not start: {lost}") from lost
        except BaseException:
            self.close()
            raise
        self._info = ready.info
        self.reasons = ready.reasons

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._child.pid

    @property
    def info(self) -> BackendInfo:
        """See `Backend`."""
        return self._info

    @property
    def alive(self) -> bool:
        """See `Mortal`."""
        return not self._child.ended.is_set()

    def watch(self, on_death: Callable[[], None]) -> None:
        """See `Mortal`."""
        self._child.watch(on_death)

    def submit(self, rows: "Rows", length: int) -> object:
        """See `Backend`."""
        assert not self._closed, "the backend is closed"
        ticket = next(self._tickets)
        try:
            self._channel.send(wire.Submit(ticket, [len(row) for row in rows], length), rows, self._spec.answer_s_max)
        except OSError as error:
            raise self._lost(error) from error
        return ticket

    def collect(self, ticket: object) -> "Outputs":
        """See `Backend`."""
        assert isinstance(ticket, int)
        outputs, arrays = self._answer(wire.Collect(ticket), wire.Outputs, self._spec.answer_s_max)
        return wire.split(arrays, outputs.shapes, outputs.dtype)

    def memory(self) -> DeviceMemory:
        """See `Backend`."""
        return self._ask(wire.AskMemory(), wire.Memory, self._spec.answer_s_max).memory

    def empty_cache(self) -> None:
        """See `Backend`."""
        self._ask(wire.EmptyCache(), wire.Done, self._spec.answer_s_max)

    def close(self) -> None:
        """See `Backend`: asks the process to end, kills it when it does not."""
        if self._closed:
            return
        self._closed = True
        with suppress(OSError):  # it is gone already
            self._channel.send(wire.Close(), seconds_max=self._spec.close_s_max)
        self._channel.close()
        self._child.end(self._spec.close_s_max)

    @property
    def _channel(self) -> wire.Channel:
        return self._child.channel

    def _ask(self, request: wire.Request, kind: type[_Answer], seconds_max: float) -> _Answer:
        return self._answer(request, kind, seconds_max)[0]

    def _answer(self, request: wire.Request, kind: type[_Answer], seconds_max: float) -> tuple[_Answer, memoryview]:
        """Sends a request and returns its answer.

        Raises:
            DeviceLost: the process is gone, or says what is no answer.
            Exception: what the backend raised.
        """
        try:
            self._channel.send(request, seconds_max=seconds_max)
            answer, arrays = self._channel.answer(seconds_max)
        except (EOFError, OSError, ValueError) as error:  # also of msgspec: a ValueError
            raise self._lost(error) from error
        if isinstance(answer, wire.Failed):
            if answer.kind == "lost":
                self._child.kill()  # it ends by itself, unless its dead device keeps it
            raise _raised(answer)
        if not isinstance(answer, kind):
            raise self._lost(ValueError(f"{type(answer).__name__} where {kind.__name__} was due"))
        return answer, arrays

    def _lost(self, error: Exception) -> DeviceLost:
        """The process will not be asked again; so it is ended for certain."""
        # A cut line: it is ending, and its status says more than the error. Else it hangs or talks nonsense.
        gone = isinstance(error, EOFError | ConnectionError) and self._child.ended.wait(1.0)
        self._child.kill()
        return DeviceLost(f"worker process {self.pid} {self._child.how if gone else f'was killed: {error}'}")


class ReopenWorker:
    """Opens workers of one kind, one after another. See `Reopen`.

    Attributes:
        spec: what they host.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self._cancelled = threading.Event()
        self._child: _Child | None = None

    def __call__(self) -> RemoteBackend:
        """See `Reopen`; raises what `RemoteBackend` does."""
        if self._cancelled.is_set():
            raise Retryable("a worker was not started: nobody waits for it any more")
        self._child = child = _Child()
        # Again: `cancel` sets first and looks for the process then, so one of the two sees the other.
        if self._cancelled.is_set():
            child.kill()
        try:
            return RemoteBackend(self.spec, child)
        finally:
            self._child = None

    def cancel(self) -> None:
        """See `Reopen`. Kills the process that is being opened, for whose end the call waits."""
        self._cancelled.set()
        child = self._child
        if child is not None:
            child.strike()


class _Child:
    """The process, with the thread that starts it and waits for its end."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.channel = wire.Channel(ours)
        self.ended = threading.Event()
        self._theirs = theirs
        self._started = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._error: Exception | None = None
        self._lock = threading.Lock()
        self._watchers: list[Callable[[], None]] = []
        self._keeper = threading.Thread(target=self._keep, name="engine-worker-keeper", daemon=True)
        self._keeper.start()
        self._started.wait()
        theirs.close()
        if self._error is not None:
            self._keeper.join()
            self.channel.close()
            raise Retryable(f"a worker process cannot be started: {self._error}") from self._error

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def how(self) -> str:
        """How it ended."""
        status = self._process.returncode if self._process else None
        if status is not None and status < 0:
            return f"was ended by {signal.Signals(-status).name}"
        return f"ended with status {status}"

    def watch(self, on_death: Callable[[], None]) -> None:
        with self._lock:
            if not self.ended.is_set():
                self._watchers.append(on_death)
                return
        on_death()

    def end(self, seconds_max: float) -> None:
        """Waits for its end, at most so long, then kills it."""
        if not self.ended.wait(seconds_max):
            self.kill()
        self._keeper.join()

    def kill(self) -> None:
        """Ends it now, and waits for its end."""
        self.strike()
        self.ended.wait()

    def strike(self) -> None:
        """Ends it soon."""
        if not self.ended.is_set() and self._process is not None:
            self._process.kill()

    def _keep(self) -> None:
        descriptor = self._theirs.fileno()
        command = [sys.executable, "-m", "engine.worker", str(descriptor), str(os.getpid())]
        try:
            # Nothing that a library prints there may end up in what our caller prints.
            self._process = subprocess.Popen(
                command, pass_fds=(descriptor,), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
        except Exception as error:  # noqa: BLE001 - whoever started it must not wait for ever
            self._error = error
            self._started.set()
            return
        self._started.set()
        self._process.wait()
        with self._lock:
            self.ended.set()
            watchers, self._watchers = self._watchers, []
        for on_death in watchers:
            on_death()


def _raised(failed: wire.Failed) -> Exception:
    """The error that the backend raised there."""
    kinds: dict[str, Callable[[str], Exception]] = {
        "memory": DeviceOutOfMemory,
        "lost": DeviceLost,
        "config": ConfigError,
        "permanent": Permanent,
        "retryable": Retryable,
        "other": RuntimeError,
    }
    return kinds[failed.kind](failed.text)


def open_workers(specs: Sequence[WorkerSpec]) -> list[RemoteBackend]:
    """Opens several side by side, all or none.

    Raises:
        Exception: of the first that could not be opened; the others are closed.
    """
    opened: list[RemoteBackend | BaseException | None] = [None] * len(specs)

    def one(place: int) -> None:
        try:
            opened[place] = RemoteBackend(specs[place])
        except BaseException as error:  # noqa: BLE001 - raised below
            opened[place] = error

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(specs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    good = [each for each in opened if isinstance(each, RemoteBackend)]
    failed = next((each for each in opened if isinstance(each, BaseException)), None)
    if failed is not None:
        for backend in good:
            backend.close()
        raise failed
    return good
