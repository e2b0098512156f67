"""A process that hosts one backend: `python -m engine.worker DESCRIPTOR PARENT_PID`, started by `engine.remote`.

It does what its parent asks over the socket, in order, and nothing else. It ends when asked to, when the socket
closes, and, by the kernel, when the parent dies. SIGINT, SIGTERM and SIGHUP are ignored: they reach the whole group
of processes, and the parent decides whether what is under way may still end.

Fails: what the backend raises is sent to the parent; after `DeviceLost` the process ends. Exit status 128:
the parent is gone already.
"""

import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from engine import wire
from engine.backend import Backend, DeviceLost, DeviceOutOfMemory
from engine.config import EngineConfig
from sluice.errors import ConfigError, Permanent, SluiceError
from sluice.parent import die_with_parent

Opener = Callable[..., tuple[Backend, dict[str, str]]]


def open_model(config: dict[str, Any], folder: str, threads: int) -> tuple[Backend, dict[str, str]]:
    """Opens the model of an engine's configuration.

    Args:
        config: the engine's section, as plain values.
        folder: of the model.
        threads: of the CPU; 0: as configured.
    """
    from engine import models
    from engine.backends import open_backend

    section = msgspec.convert(config, EngineConfig)
    reasons: dict[str, str] = {}
    return open_backend(section, models.read_card(section.model, Path(folder)), reasons, threads), reasons


def serve(channel: wire.Channel) -> None:
    """Opens what the first request names, and answers the others until it is told to close or the line is cut."""
    request, _ = channel.request()
    assert isinstance(request, wire.Open), "the first request opens"
    if request.cpus:
        with suppress(OSError):  # the CPUs may have been taken from the process since
            os.sched_setaffinity(0, request.cpus)
    try:
        module, _, name = request.opener.partition(":")
        opener: Opener = getattr(import_module(module), name)
        backend, reasons = opener(**request.arguments)
    except Exception as error:  # noqa: BLE001 - the parent raises it, as if the backend were in its process
        channel.send(_failed(error))
        return
    try:
        channel.send(wire.Ready(backend.info, reasons))
        _answer(channel, backend)
    finally:
        backend.close()


def _answer(channel: wire.Channel, backend: Backend) -> None:
    # By number: after a failure the parent asks for the parts of an older batch before a younger one.
    under_way: dict[int, object] = {}
    while True:
        request, arrays = channel.request()
        match request:
            case wire.Submit():
                under_way[request.ticket] = _submit(backend, request, arrays)
            case wire.Collect():
                unknown = ValueError(f"no batch {request.ticket} is under way")
                if not _collect(channel, backend, under_way.pop(request.ticket, unknown)):
                    return
            case wire.AskMemory():
                channel.send(_tried(lambda: wire.Memory(backend.memory())))
            case wire.EmptyCache():
                channel.send(_tried(lambda: _empty(backend)))
            case _:
                return


def _submit(backend: Backend, request: wire.Submit, arrays: memoryview) -> object:
    """The ticket, or the error in its place: it is told when the batch is collected."""
    rows = wire.split(arrays, [[length] for length in request.rows], "<i4")
    try:
        return backend.submit(rows, request.length)
    except Exception as error:  # noqa: BLE001 - as above
        return error


def _collect(channel: wire.Channel, backend: Backend, ticket: object) -> bool:
    """Answers a batch. False when the device is lost: another process may do what this one never will again."""
    try:
        if isinstance(ticket, Exception):
            raise ticket  # noqa: TRY301 - told as what `collect` raises is
        outputs = list(backend.collect(ticket))
    except Exception as error:  # noqa: BLE001 - as above
        channel.send(_failed(error))
        return not isinstance(error, DeviceLost)
    channel.send(wire.Outputs([list(row.shape) for row in outputs], outputs[0].dtype.str), outputs)
    return True


def _tried(answer: Callable[[], wire.Answer]) -> wire.Answer:
    try:
        return answer()
    except Exception as error:  # noqa: BLE001 - as above
        return _failed(error)


def _empty(backend: Backend) -> wire.Done:
    backend.empty_cache()
    return wire.Done()


def _failed(error: Exception) -> wire.Failed:
    if isinstance(error, DeviceOutOfMemory):
        return wire.Failed("memory", str(error))
    if isinstance(error, DeviceLost):
        return wire.Failed("lost", str(error))
    if isinstance(error, ConfigError):
        return wire.Failed("config", str(error))
    if isinstance(error, Permanent):
        return wire.Failed("permanent", str(error))
    if isinstance(error, SluiceError):
        return wire.Failed("retryable", str(error))
    return wire.Failed("other", f"{type(error).__name__}: {error}")


def main(arguments: list[str]) -> int:
    """Serves over the descriptor given; returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    descriptor, parent_pid = (int(each) for each in arguments)
    die_with_parent()
    if os.getppid() != parent_pid:
        return 128
    channel = wire.Channel(socket.socket(fileno=descriptor))
    try:
        serve(channel)
    except (EOFError, OSError):
        return 0  # the parent has closed the line
    finally:
        channel.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
