"""Tokenising in several processes, for hosts where the tokenizer and not the device is the limit.

In one process the Rust tokenizer uses all cores, but turning its answer into arrays needs the interpreter's lock: that
part of the work is serial, whatever the number of cores. Children do it each for itself and answer with packed bytes,
so what stays serial is copying. Below `TEXTS_MIN` texts, and while no child is ready, the work is done in this process.

Measured on real log lines with MiniLM's tokenizer, interleaved, on two cores: two children tokenise 0.90 times as many
texts a second as this process alone; the serial part falls from 4.1% of the work to 1.0%. By Amdahl's law, and with two
cores left to the rest of the engine, that would be 0.9 times at 8 cores, 1.1 at 12, 1.3 at 16 and 1.7 at 32 (computed,
not measured). So children are for many cores beside a GPU, and for nothing else.

Protocol, over one socket pair per child, little-endian; each frame is two u32 (count, bytes) and a body:

    to the child, once:  (longest input in tokens, bytes) + the tokenizer as JSON
    to the child:        (texts, bytes) + u32 length of each text in bytes + the texts in UTF-8
    from the child:      (texts, bytes) + u32 length of each row + u32 dropped of each row + the ids, int32

Invariants: the ids are those of `Tokenizer.encode` in this process, because children run the same code on the same
tokenizer; at most one chunk is under way per child; a child ends when its socket does, so none outlives its parent,
however that ended (the kernel closes the socket; a parent-death signal would end them with the *thread* that forked).

Fails: a child that dies, hangs or answers nonsense is ended and replaced (`REPLACEMENTS_MAX` times, then the pool goes
on with those that are left), and its chunk is tokenised in this process, once.
"""

import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from engine.tokens import Tokenizer, Tokens

if TYPE_CHECKING:
    import numpy.typing as npt

_FRAME: Final = struct.Struct("<II")
# Below it the round trip costs more than it saves, and an online text would wait for a child.
TEXTS_MIN: Final = 64
# A child's share of a call, at least.
_CHUNK_TEXTS_MIN: Final = 16
REPLACEMENTS_MAX: Final = 16
# A chunk takes milliseconds; a child that needs longer than this hangs.
ANSWER_S_MAX: Final = 60.0
_END_S_MAX: Final = 5.0
# From the figures above: fewer cores gain little or lose.
_CORES_MIN: Final = 16
# Each child holds a tokenizer of its own, some 40 MB.
_PROCESSES_MAX: Final = 32


def processes_for(configured: int, device: str, cores: int) -> int:
    """How many children to use; 0 for none.

    On a CPU the model takes about fifty times as long as the tokenizer, and both want the same cores: none. Beside a
    GPU the children take the cores that the rest of the engine (host thread, compute thread) leaves.

    Args:
        configured: `engine.tokenizer_processes`: 0 for automatic, 1 for this process alone.
        device: of the backend, such as `cpu` or `cuda:0`.
        cores: that this process may use.
    """
    if configured:
        return configured if configured > 1 else 0
    if not device.startswith("cuda") or cores < _CORES_MIN:
        return 0
    return min(cores - 2, _PROCESSES_MAX)


def reason_for(processes: int, configured: int) -> str:
    """What `sluice engine plan` says about it."""
    if processes:
        return f"{processes} processes" + (": configured" if configured else ", since the GPU outruns one")
    why = "configured" if configured else "the tokenizer is not the limit on this machine"
    return f"in this process, on all cores: {why}"


class TokenPool:
    """A tokenizer's children. `encode` is called by one thread at a time.

    Args:
        tokenizer: what the children get a copy of, and what does the work when they cannot.
        processes: how many children.
        texts_min: shorter calls are done in this process.
        on_trouble: told, on any thread, when a child ends or cannot be started.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        processes: int,
        texts_min: int = TEXTS_MIN,
        on_trouble: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._tokenizer = tokenizer
        self._processes = processes
        self._texts_min = texts_min
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="tokenize")
        self._on_trouble = on_trouble
        self._lock = threading.Lock()
        self._closed = False
        self.replaced = 0
        self._starts = [self._threads.submit(self._start) for _ in range(processes)]

    @property
    def ready(self) -> int:
        """Children that wait for work now."""
        return self._idle.qsize()

    def wait(self) -> None:
        """Until each child has begun, or failed to."""
        for start in self._starts:
            start.result()

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """As `Tokenizer.encode`."""
        if len(texts) < self._texts_min or not self.ready:
            return self._tokenizer.encode(texts)
        size = max(_CHUNK_TEXTS_MIN, -(-len(texts) // self._processes))
        chunks = [texts[start : start + size] for start in range(0, len(texts), size)]
        return [tokens for part in self._threads.map(self._encode, chunks) for tokens in part]

    def close(self) -> None:
        """Ends the children and waits for them. Idempotent."""
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        children = []
        while not self._idle.empty():
            children.append(self._idle.get())
            children[-1].hang_up()
        for child in children:
            child.end()

    def _start(self) -> None:
        if self._closed:
            return
        try:
            self._idle.put(_Child(self._tokenizer))
        except OSError as error:  # no room for a process: the others, or this one, do the work
            self._on_trouble(f"a tokenizer process cannot be started: {error}")

    def _encode(self, texts: Sequence[str]) -> list[Tokens]:
        try:
            child = self._idle.get_nowait()
        except queue.Empty:
            return self._tokenizer.encode(texts)
        try:
            tokens = child.encode(texts)
        except (OSError, ValueError) as error:  # it died (EOF, broken pipe), hangs (time-out), or answers nonsense
            self._on_trouble(f"a tokenizer process is given up: {type(error).__name__}")
            child.end(patience_s=0)
            self._replace()
            return self._tokenizer.encode(texts)
        self._idle.put(child)
        return tokens

    def _replace(self) -> None:
        with self._lock:
            self.replaced += 1
            again = self.replaced <= REPLACEMENTS_MAX
        if again and not self._closed:
            with suppress(RuntimeError):  # closing
                self._starts.append(self._threads.submit(self._start))


class _Child:
    """A process that tokenises, driven by one thread at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # One thread each: the processes are what runs side by side.
            settings = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
            self._socket = ours
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "engine.token_pool"],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,  # a traceback may quote a text
                    env=os.environ | settings,
                )
            except OSError:
                ours.close()
                raise
        ours.settimeout(ANSWER_S_MAX)
        body = tokenizer.to_json().encode()
        try:
            _send(ours, tokenizer.length_max, body)
            _receive(ours)  # empty: it is ready
        except OSError:
            self.end()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Raises OSError or ValueError when the child cannot be used any more."""
        import numpy as np

        bodies = [text.encode() for text in texts]
        lengths = np.array([len(body) for body in bodies], "<u4")
        _send(self._socket, len(bodies), lengths.tobytes() + b"".join(bodies))
        count, body = _receive(self._socket)
        if count != len(texts):
            raise ValueError(f"{count} rows for {len(texts)} texts")
        return _unpack(body, count)

    def hang_up(self) -> None:
        """Tells it to end."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def end(self, patience_s: float = _END_S_MAX) -> None:
        """Hangs up and waits for its end; kills it when that takes longer than `patience_s` seconds."""
        self.hang_up()
        self._socket.close()
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(connection: socket.socket) -> None:
    """What a child does: answers until the other side hangs up."""
    from tokenizers import Tokenizer as Fast

    length_max, body = _receive(connection)
    tokenizer = Tokenizer(Fast.from_str(body.decode()), length_max)
    _send(connection, 0, b"")
    while True:
        count, body = _receive(connection)
        _send(connection, count, _pack(tokenizer.encode(_texts(body, count))))


def _texts(body: bytearray, count: int) -> list[str]:
    texts, at = [], 4 * count
    for (length,) in struct.iter_unpack("<I", body[: 4 * count]):
        texts.append(body[at : at + length].decode())
        at += length
    return texts


def _pack(rows: Sequence[Tokens]) -> bytes:
    import numpy as np

    lengths = np.array([len(row.ids) for row in rows], "<u4")
    dropped = np.array([row.dropped for row in rows], "<u4")
    ids: npt.NDArray[np.int32] = np.concatenate([row.ids for row in rows])
    return lengths.tobytes() + dropped.tobytes() + ids.astype("<i4", copy=False).tobytes()


def _unpack(body: bytearray, count: int) -> list[Tokens]:
    import numpy as np

    numbers = np.frombuffer(body, "<i4")
    if len(numbers) < 2 * count or len(numbers) - 2 * count != int(numbers[:count].sum()):
        raise ValueError(f"{len(numbers)} numbers for {count} rows")
    ends = np.cumsum(numbers[:count]).tolist()
    ids = numbers[2 * count :].astype(np.int32)
    starts = [0, *ends[:-1]]
    dropped = numbers[count : 2 * count].tolist()
    return [Tokens(ids[start:end], lost) for start, end, lost in zip(starts, ends, dropped, strict=True)]


def _send(connection: socket.socket, count: int, body: bytes) -> None:
    connection.sendall(_FRAME.pack(count, len(body)))
    connection.sendall(body)


def _receive(connection: socket.socket) -> tuple[int, bytearray]:
    count, size = _FRAME.unpack(_exactly(connection, _FRAME.size))
    return count, _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> bytearray:
    content = bytearray(size)
    view = memoryview(content)
    while view:
        got = connection.recv_into(view)
        if not got:
            raise ConnectionResetError("the other side hung up")
        view = view[got:]
    return content


def main() -> None:
    """A child: serves the socket that is its standard input."""
    # These go to the whole group; a child ends when its parent hangs up.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=0) as connection, suppress(ConnectionError):
        serve(connection)


if __name__ == "__main__":
    main()
