"""A TCP proxy that breaks connections on command: cut, refuse, hang, delay, trickle.

    with FaultProxy(broker.port) as proxy:
        client.connect("127.0.0.1", proxy.port)
        proxy.hang()      # bytes stop moving, the connection stays up: what a lost route looks like
        proxy.heal()      # what was on the way arrives, late
        proxy.cut()       # RST to both sides; what was on the way is gone
        proxy.refuse()    # connections are cut, new ones refused: what a dead host's port looks like

It runs in a thread with an event loop of its own, so that tests with and without asyncio use it alike; each method
returns when the fault is in force. Bytes on the way are bounded (`_CHUNKS_MAX` chunks per direction), then the sender
feels back-pressure. `tap` sees every byte that is forwarded, in order per connection and direction: a recorder.
"""

import asyncio
import contextlib
import enum
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Self, TypeVar

_T = TypeVar("_T")
_HOST = "127.0.0.1"
_CHUNK_BYTES = 64 * 1024
_CHUNKS_MAX = 64
_TRICKLE_BYTES = 1024
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER with zero seconds: RST instead of FIN
_CALL_TIMEOUT_S = 10.0


class Direction(enum.Enum):
    """Seen from the client."""

    UP = "up"
    DOWN = "down"


Tap = Callable[[int, Direction, bytes], None]
BOTH = (Direction.UP, Direction.DOWN)


class _Faults:
    """What is wrong with one direction, for all connections. Lives in the loop's thread."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.bytes_per_s: float | None = None
        self.bytes_until_cut: int | None = None
        self.flowing = asyncio.Event()
        self.flowing.set()

    def heal(self) -> None:
        self.delay_s = 0.0
        self.bytes_per_s = None
        self.bytes_until_cut = None
        self.flowing.set()


class FaultProxy:
    """A proxy in front of one server.

    Args:
        target_port: of the server, on the loopback interface; it need not run yet.
        listen_port: 0 for any free one; `port` says which.
        tap: called in the proxy's thread with (connection number, direction, bytes) for what is forwarded.
    """

    def __init__(self, target_port: int, *, listen_port: int = 0, tap: Tap | None = None) -> None:
        self.port = listen_port
        self.connections_total = 0
        self._target_port = target_port
        self._tap = tap
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._faults: dict[Direction, _Faults] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_TIMEOUT_S)
        self._loop.close()

    @property
    def connections(self) -> int:
        """How many are open now."""
        return len(self._connections)

    def cut(self) -> int:
        """Resets every connection; returns how many. New ones are welcome."""
        return self._call(self._reset_all())

    def refuse(self) -> None:
        """Resets every connection and refuses new ones, until `heal`."""
        self._call(self._stop_listening())
        self.cut()

    def hang(self, *directions: Direction) -> None:
        """Stops moving bytes in these directions (both by default), on old and new connections, until `heal`."""
        self._call(self._change(directions, lambda faults: faults.flowing.clear()))

    def delay(self, seconds: float, *directions: Direction) -> None:
        """Every byte arrives this much later (both directions by default); the rate stays."""
        self._call(self._change(directions, lambda faults: setattr(faults, "delay_s", seconds)))

    def trickle(self, bytes_per_s: float, *directions: Direction) -> None:
        """A slow line: per connection, in each of these directions."""
        self._call(self._change(directions, lambda faults: setattr(faults, "bytes_per_s", bytes_per_s)))

    def cut_after(self, byte_count: int, *directions: Direction) -> None:
        """Resets the connection that would move the next byte after these: in the middle of a message. Once."""
        self._call(self._change(directions, lambda faults: setattr(faults, "bytes_until_cut", byte_count)))

    def heal(self) -> None:
        """Takes all faults away; bytes that hung move on."""
        self._call(self._change((), _Faults.heal))
        self._call(self._listen())

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_TIMEOUT_S)

    async def _change(self, directions: tuple[Direction, ...], change: Callable[[_Faults], None]) -> None:
        for direction in directions or BOTH:
            change(self._faults[direction])

    async def _open(self) -> None:
        self._faults = {direction: _Faults() for direction in BOTH}
        await self._listen()

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, _HOST, self.port, limit=_CHUNK_BYTES)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _close(self) -> None:
        await self._stop_listening()
        await self._reset_all()

    async def _reset_all(self) -> int:
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await asyncio.sleep(0)  # the aborted sockets are closed by the loop's next turn
        return len(connections)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self.connections_total += 1
        try:
            await self._serve(self.connections_total, reader, writer)
        except asyncio.CancelledError:
            _reset(writer)  # a cut: the task ends here and not as cancelled, which the server would report
        finally:
            self._connections.discard(task)

    async def _serve(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream = await asyncio.open_connection(_HOST, self._target_port, limit=_CHUNK_BYTES)
        except OSError:
            _reset(writer)
            return
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._forward(number, Direction.UP, reader, upstream[1]))
                group.create_task(self._forward(number, Direction.DOWN, upstream[0], writer))
        except* OSError:  # one side is gone: so is the other
            _reset(writer)
        else:
            writer.close()
            upstream[1].close()
        finally:
            if not upstream[1].is_closing():
                _reset(upstream[1])

    async def _forward(
        self, number: int, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Reading and writing are two tasks, so that a delay does not lower the rate."""
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_CHUNKS_MAX)
        faults = self._faults[direction]
        async with asyncio.TaskGroup() as group:
            group.create_task(self._receive(faults, reader, on_the_way))
            group.create_task(self._deliver(number, direction, on_the_way, writer))

    async def _receive(
        self, faults: _Faults, reader: asyncio.StreamReader, on_the_way: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        chunk = b"first"
        while chunk:
            chunk = await reader.read(_CHUNK_BYTES)
            await on_the_way.put((self._loop.time() + faults.delay_s, chunk))

    async def _deliver(
        self,
        number: int,
        direction: Direction,
        on_the_way: asyncio.Queue[tuple[float, bytes]],
        writer: asyncio.StreamWriter,
    ) -> None:
        faults = self._faults[direction]
        while True:
            due, chunk = await on_the_way.get()
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            await faults.flowing.wait()
            if not chunk:
                break
            for piece in _pieces(chunk, faults):
                await self._write(number, direction, piece, writer)
        with contextlib.suppress(OSError):
            writer.write_eof()

    async def _write(self, number: int, direction: Direction, piece: bytes, writer: asyncio.StreamWriter) -> None:
        faults = self._faults[direction]
        await faults.flowing.wait()
        if faults.bytes_per_s:
            await asyncio.sleep(len(piece) / faults.bytes_per_s)
        cut = faults.bytes_until_cut is not None and faults.bytes_until_cut < len(piece)
        if cut:
            piece = piece[: faults.bytes_until_cut]
        if self._tap and piece:
            self._tap(number, direction, piece)
        writer.write(piece)
        await writer.drain()
        if cut:
            faults.bytes_until_cut = None
            raise ConnectionResetError("cut_after")
        if faults.bytes_until_cut is not None:
            faults.bytes_until_cut -= len(piece)


def _pieces(chunk: bytes, faults: _Faults) -> list[bytes]:
    size = _TRICKLE_BYTES if faults.bytes_per_s else len(chunk)
    return [chunk[start : start + size] for start in range(0, len(chunk), size)]


def _reset(writer: asyncio.StreamWriter) -> None:
    connection: socket.socket | None = writer.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()
