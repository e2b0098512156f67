"""Ports on the loopback interface, for brokers and processes of one machine."""

import random
import socket
from typing import Final

from sluice.errors import ConfigError

HOST: Final = "127.0.0.1"
_PORT_FIRST: Final = 12_000
_PORT_END: Final = 32_768  # where Linux's ip_local_port_range begins by default


def free_port() -> int:
    """A TCP port that nobody listens on now.

    It lies below the ports that the kernel gives to outgoing connections, so that none of those takes it while a
    process that owns it restarts. Another process may still take it before its user does: name it if so.
    """
    while True:
        port = random.randrange(_PORT_FIRST, _PORT_END)
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        return port


def claim_port(port: int, purpose: str) -> int:
    """The port itself when nobody listens on it; a free one for 0.

    Raises:
        ConfigError: naming the port and its purpose, when it is taken.
    """
    if port == 0:
        return free_port()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections in TIME_WAIT do not count
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(f"{purpose}: cannot listen on {HOST}:{port}: {error.strerror}") from error
    return port


def accepts(port: int, timeout_s: float = 0.2) -> bool:
    """Whether something accepts connections on the port."""
    try:
        with socket.create_connection((HOST, port), timeout=timeout_s):
            return True
    except OSError:
        return False
