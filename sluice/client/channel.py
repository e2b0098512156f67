"""gRPC channels as the client wants them: TLS, keep-alive, no running ahead."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sluice.config import read_secret

if TYPE_CHECKING:
    import grpc

MESSAGE_BYTES_MAX: Final = 32 << 20
OPTIONS: Final = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    # Without this the server runs megabytes ahead of a slow client.
    ("grpc.http2.bdp_probe", 0),
    # A connection that is dead without a word is noticed after 10 + 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Reconnecting is ours: gRPC's own back-off would be added to it.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


@dataclass(frozen=True, slots=True)
class Tls:
    """Files (PEM) for TLS.

    Attributes:
        ca_file: who may vouch for the server; None for the system's authorities.
        certificate_file, key_file: the client's own, for mTLS.
        server_name: the name in the server's certificate, when it is not the target's host.
    """

    ca_file: str | None = None
    certificate_file: str | None = None
    key_file: str | None = None
    server_name: str | None = None


def options(tls: Tls | None) -> list[tuple[str, str | int]]:
    """Channel options."""
    named: list[tuple[str, str | int]] = list(OPTIONS)
    if tls is not None and tls.server_name:
        named.append(("grpc.ssl_target_name_override", tls.server_name))
    return named


def credentials(tls: Tls) -> "grpc.ChannelCredentials":
    """Channel credentials.

    Raises:
        ConfigError: naming a file that cannot be read.
    """
    import grpc

    return grpc.ssl_channel_credentials(
        root_certificates=_read(tls.ca_file, "CA certificate"),
        private_key=_read(tls.key_file, "client key"),
        certificate_chain=_read(tls.certificate_file, "client certificate"),
    )


def _read(path: str | None, what: str) -> bytes | None:
    text = read_secret(path, what)
    return None if text is None else text.encode()
