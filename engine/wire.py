"""What a worker process and its parent say to each other.

A message is one frame of `multiprocessing.connection` (a length, then bytes; nothing is ever pickled):

    header length u32 little-endian | header, MessagePack, a tagged struct of this module | raw arrays

The parent asks, in order; `Submit` is not answered, everything else is, so that a worker is driven exactly as a
backend in the same process is. Rows of a batch are int32 ids one behind the other, outputs are one array after
the other in the dtype that `Outputs` names.

Fails: `EOFError` or `OSError` when the other side is gone; `ValueError` (`msgspec.DecodeError` too) for what is no
message.
"""

from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from engine.backend import BackendInfo, DeviceMemory

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

# A batch's outputs may be one vector per token: far above what any batch needs, far below what memory holds.
FRAME_BYTES_MAX: Final = 1 << 30


class Open(msgspec.Struct, frozen=True, tag=True):
    """Open a backend: `module:function`, which takes the arguments and returns a backend and its reasons."""

    opener: str
    arguments: dict[str, Any]
    cpus: list[int]


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Start a batch: the rows' lengths, and the length that they are padded to."""

    rows: list[int]
    length: int


class Collect(msgspec.Struct, frozen=True, tag=True):
    """Answer the oldest batch: `Outputs` or `Failed`."""


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

    kind: Literal["memory", "config", "permanent", "retryable", "other"]
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
        connection: owned by this object.
    """

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection
        self._requests = msgspec.msgpack.Decoder(Request)
        self._answers = msgspec.msgpack.Decoder(Answer)

    def send(self, message: Request | Answer, arrays: "Sequence[Array]" = ()) -> None:
        """Sends a message with arrays behind it; blocks while the other side does not read."""
        header = msgspec.msgpack.encode(message)
        parts = [len(header).to_bytes(4, "little"), header, *(array.tobytes() for array in arrays)]
        self._connection.send_bytes(b"".join(parts))

    def request(self) -> tuple[Request, memoryview]:
        """Waits for a request."""
        header, arrays = self._receive()
        return self._requests.decode(header), arrays

    def answer(self, seconds_max: float) -> tuple[Answer, memoryview]:
        """Waits for an answer.

        Raises:
            TimeoutError: there was none in time.
        """
        if not self._connection.poll(seconds_max):
            raise TimeoutError(f"no answer within {seconds_max:g} s")
        header, arrays = self._receive()
        return self._answers.decode(header), arrays

    def close(self) -> None:
        """Closes this end. Idempotent."""
        if not self._connection.closed:
            self._connection.close()

    def _receive(self) -> tuple[memoryview, memoryview]:
        frame = memoryview(self._connection.recv_bytes(FRAME_BYTES_MAX))
        end = 4 + int.from_bytes(frame[:4], "little")
        if end > len(frame):
            raise ValueError("a frame that ends within its header")
        return frame[4:end], frame[end:]


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
