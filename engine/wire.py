"""What a worker process and its parent say to each other.

A message is one frame over a stream socket; nothing is ever pickled:

    frame length u32 little-endian | header length u32 little-endian | header | raw arrays

The header is MessagePack, a tagged struct of this module.

The parent asks, in order; `Submit` is not answered, everything else is, so that a worker is driven exactly as a
backend in the same process is. Rows of a batch are int32 ids one behind the other, outputs are one array after
the other in the dtype that `Outputs` names.

Fails: `EOFError` or `OSError` when the other side is gone; `TimeoutError` (an `OSError` too) when it neither reads nor
answers in time: the line cannot be used any more, since part of a frame may be under way; `ValueError`
(`msgspec.DecodeError` too) for what is no message.
"""

import socket
import struct
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from engine.backend import BackendInfo, DeviceMemory

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

# A batch's outputs may be one vector per token: far above what any batch needs, far below what memory holds.
FRAME_BYTES_MAX: Final = 1 << 30
_LENGTH: Final = struct.Struct("<I")


class Open(msgspec.Struct, frozen=True, tag=True):
    """Open a backend: `module:function`, which takes the arguments and returns a backend and its reasons."""

    opener: str
    arguments: dict[str, Any]
    cpus: list[int]


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Start a batch: its number, the rows' lengths, and the length that they are padded to."""

    ticket: int
    rows: list[int]
    length: int


class Collect(msgspec.Struct, frozen=True, tag=True):
    """Answer the batch of this number, once: `Outputs` or `Failed`."""

    ticket: int


class AskMemory(msgspec.Struct, frozen=True, tag=True):
    """Answered by `Memory`."""


class EmptyCache(msgspec.Struct, frozen=True, tag=True):
    """Answered by `Done`."""


class Close(msgspec.Struct, frozen=True, tag=True):
    """Release the model and end."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The backend is open."""

    info: BackendInfo
    reasons: dict[str, str]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """It did not work; `kind` says which error the parent raises."""

    kind: Literal["memory", "lost", "config", "permanent", "retryable", "other"]
    text: str


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """A batch's outputs: the shape of each, all of one dtype."""

    shapes: list[list[int]]
    dtype: str


class Memory(msgspec.Struct, frozen=True, tag=True):
    """The device's memory."""

    memory: DeviceMemory


class Done(msgspec.Struct, frozen=True, tag=True):
    """It was done."""


Request = Open | Submit | Collect | AskMemory | EmptyCache | Close
Answer = Ready | Failed | Outputs | Memory | Done


class Channel:
    """One end of the line. Used by one thread at a time.

    Args:
        end: a connected stream socket, owned by this object.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._requests = msgspec.msgpack.Decoder(Request)
        self._answers = msgspec.msgpack.Decoder(Answer)

    def send(self, message: Request | Answer, arrays: "Sequence[Array]" = (), seconds_max: float | None = None) -> None:
        """Sends a message with arrays behind it; blocks while the other side does not read, at most so long.

        Raises:
            TimeoutError: it was not read in time.
        """
        header = msgspec.msgpack.encode(message)
        parts = [_LENGTH.pack(len(header)), header, *(array.tobytes() for array in arrays)]
        self._socket.settimeout(seconds_max)
        try:
            self._socket.sendall(b"".join([_LENGTH.pack(sum(map(len, parts))), *parts]))
        except TimeoutError as error:
            raise TimeoutError(f"not read within {seconds_max:g} s") from error

    def request(self) -> tuple[Request, memoryview]:
        """Waits for a request."""
        header, arrays = self._receive(None)
        return self._requests.decode(header), arrays

    def answer(self, seconds_max: float) -> tuple[Answer, memoryview]:
        """Waits for an answer.

        Raises:
            TimeoutError: it was not there, as a whole, in time.
        """
        try:
            header, arrays = self._receive(time.monotonic() + seconds_max)
        except TimeoutError as error:
            raise TimeoutError(f"no answer within {seconds_max:g} s") from error
        return self._answers.decode(header), arrays

    def close(self) -> None:
        """Closes this end. Idempotent."""
        self._socket.close()

    def _receive(self, end_s: float | None) -> tuple[memoryview, memoryview]:
        (size,) = _LENGTH.unpack(self._exactly(_LENGTH.size, end_s))
        if size > FRAME_BYTES_MAX:
            raise ValueError(f"a frame of {size} bytes")
        frame = memoryview(self._exactly(size, end_s))
        end = _LENGTH.size + int.from_bytes(frame[: _LENGTH.size], "little")
        if end > len(frame):
            raise ValueError("a frame that ends within its header")
        return frame[_LENGTH.size : end], frame[end:]

    def _exactly(self, size: int, end_s: float | None) -> bytearray:
        content = bytearray(size)
        view = memoryview(content)
        while view:
            # Not 0 when time is up: that would mean not to wait at all, which is another error.
            self._socket.settimeout(None if end_s is None else max(end_s - time.monotonic(), 1e-3))
            got = self._socket.recv_into(view)
            if not got:
                raise EOFError("the other side hung up")
            view = view[got:]
        return content


def split(arrays: memoryview, shapes: Sequence[Sequence[int]], dtype: str) -> "list[Array]":
    """The arrays behind a message: copies, each the caller's own.

    Raises:
        ValueError: they are not as announced.
    """
    import numpy as np

    flat = np.frombuffer(arrays, np.dtype(dtype))
    found, start = [], 0
    for shape in shapes:
        size = int(np.prod(shape))
        found.append(flat[start : start + size].reshape(shape).copy())
        start += size
    if start != len(flat):
        raise ValueError(f"{len(flat)} numbers where {start} were announced")
    return found
