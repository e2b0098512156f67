"""Each fault of the proxy is what its name says."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.brokers.clients import TIMEOUT_S, eventually
from tests.brokers.proxy import Direction, FaultProxy


class EchoServer:
    """Sends back what it gets, until either side ends."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive(), "a connection was left open"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._echo, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _echo(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    connection.sendall(data)
            except OSError:
                return


@pytest.fixture
def server() -> Iterator[EchoServer]:
    server = EchoServer()
    yield server
    server.close()


@pytest.fixture
def proxy(server: EchoServer) -> Iterator[FaultProxy]:
    with FaultProxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[socket.socket]:
    with connect(proxy) as client:
        yield client


def connect(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=TIMEOUT_S)


def receive(client: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (chunk := client.recv(count - len(data))):
        data += chunk
    return data


def ask(proxy: FaultProxy) -> bytes:
    with connect(proxy) as client:
        return client.recv(1)


def round_trip(client: socket.socket, data: bytes = b"ping") -> bytes:
    client.sendall(data)
    return receive(client, len(data))


def test_without_a_fault_every_byte_passes_in_order(client: socket.socket) -> None:
    data = bytes(range(256)) * 40_000
    sender = threading.Thread(target=client.sendall, args=(data,))
    sender.start()
    assert receive(client, len(data)) == data
    sender.join()


def test_an_end_of_stream_is_passed_on(client: socket.socket) -> None:
    client.sendall(b"last words")
    client.shutdown(socket.SHUT_WR)
    assert receive(client, 100) == b"last words"


def test_cut_resets_open_connections_and_accepts_new_ones(proxy: FaultProxy, client: socket.socket) -> None:
    round_trip(client)
    assert proxy.cut() == 1
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert proxy.connections == 0
    with connect(proxy) as again:
        assert round_trip(again) == b"ping"
    assert proxy.connections_total == 2


def test_refuse_lasts_until_heal_on_the_same_port(proxy: FaultProxy, client: socket.socket) -> None:
    round_trip(client)
    proxy.refuse()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    port = proxy.port
    proxy.heal()
    assert proxy.port == port
    with connect(proxy) as again:
        assert round_trip(again) == b"ping"


def test_hang_holds_bytes_back_and_heal_lets_them_go(proxy: FaultProxy, client: socket.socket) -> None:
    round_trip(client)
    proxy.hang()
    client.sendall(b"late")
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):
        client.recv(1)
    client.settimeout(TIMEOUT_S)
    proxy.heal()
    assert receive(client, 4) == b"late"


def test_hang_may_concern_one_direction_only(server: EchoServer) -> None:
    seen: list[bytes] = []
    tap = lambda _number, direction, data: seen.append(data) if direction is Direction.UP else None  # noqa: E731
    with FaultProxy(server.port, tap=tap) as proxy, connect(proxy) as client:
        proxy.hang(Direction.DOWN)
        client.sendall(b"asked")
        eventually(lambda: b"".join(seen) == b"asked", "the request arrived")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)


def test_a_hung_connection_makes_its_sender_feel_it(proxy: FaultProxy, client: socket.socket) -> None:
    proxy.hang()
    client.settimeout(1.0)
    with pytest.raises(TimeoutError):
        client.sendall(bytes(256 << 20))


def test_a_cut_ends_a_hang(proxy: FaultProxy, client: socket.socket) -> None:
    proxy.hang()
    client.sendall(b"lost")
    eventually(lambda: proxy.cut() == 1, "a connection to cut")
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_delay_is_latency_and_not_a_lower_rate(proxy: FaultProxy, client: socket.socket) -> None:
    round_trip(client)
    proxy.delay(0.15)
    started = time.monotonic()
    round_trip(client, bytes(2 << 20))
    took_s = time.monotonic() - started
    assert 0.3 <= took_s < 2.0  # 32 chunks, one after the other, would take 9.6 s


def test_trickle_limits_the_rate(proxy: FaultProxy, client: socket.socket) -> None:
    proxy.trickle(100_000, Direction.UP)
    started = time.monotonic()
    round_trip(client, bytes(30_000))
    assert time.monotonic() - started >= 0.29


def test_cut_after_ends_a_connection_in_the_middle_of_a_message_once(server: EchoServer) -> None:
    seen: list[bytes] = []
    with FaultProxy(server.port, tap=lambda _number, _direction, data: seen.append(data)) as proxy:
        proxy.cut_after(10, Direction.UP)
        with connect(proxy) as client:
            client.sendall(b"0123456789abcdef")
            with pytest.raises(ConnectionResetError):
                receive(client, 16)
        assert seen[0] == b"0123456789"
        with connect(proxy) as again:
            assert round_trip(again) == b"ping"


def test_the_tap_sees_both_directions_of_each_connection(server: EchoServer) -> None:
    seen: list[tuple[int, Direction, bytes]] = []
    with FaultProxy(server.port, tap=lambda *event: seen.append(event)) as proxy:
        for text in (b"one", b"two"):
            with connect(proxy) as client:
                round_trip(client, text)
    assert seen == [
        (1, Direction.UP, b"one"),
        (1, Direction.DOWN, b"one"),
        (2, Direction.UP, b"two"),
        (2, Direction.DOWN, b"two"),
    ]


def test_a_server_that_is_away_is_a_reset_and_the_proxy_lives_on() -> None:
    with socket.socket() as silent:  # bound, so that nobody else listens there, and not listening
        silent.bind(("127.0.0.1", 0))
        with FaultProxy(silent.getsockname()[1]) as proxy:
            for _ in range(2):
                with pytest.raises(ConnectionResetError):  # while it connects, or right afterwards
                    ask(proxy)


async def test_it_serves_asyncio_clients_of_the_same_thread(proxy: FaultProxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        await reader.readexactly(1)
    writer.close()
