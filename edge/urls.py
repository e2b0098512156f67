"""Quick flags: broker and source in one word each."""

from typing import Any
from urllib.parse import urlsplit

from sluice.errors import ConfigError

_PORTS = {"mqtt": 1883, "mqtts": 8883}
_SOURCES = "tail:GLOB, host, stdin, stdin:json, generator:RATE or generator:RATE:COUNT"


def parse_broker(url: str) -> dict[str, Any]:
    """`mqtt://[user@]host[:port]` as keys of `[mqtt]`.

    Raises:
        ConfigError: naming what is wrong.
    """
    parts = urlsplit(url if "://" in url else f"mqtt://{url}")
    try:
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"--broker {url}: {error}") from error
    if parts.scheme not in _PORTS or not parts.hostname or parts.path.strip("/"):
        raise ConfigError(f"--broker {url}: expected mqtt://host:port")
    if parts.password is not None:
        raise ConfigError("--broker: a password on the command line can be read by all users; set mqtt.password_file")
    keys: dict[str, Any] = {"host": parts.hostname, "port": port or _PORTS[parts.scheme]}
    if parts.username is not None:
        keys["username"] = parts.username
    return keys


def parse_source(word: str, stream: str | None, *, follow: bool = True) -> dict[str, Any]:
    """A `--source` as keys of `[[sources]]`.

    Args:
        word: such as `tail:/var/log/*.log`.
        stream: the stream, or None for the kind's own.
        follow: False: `tail` ends at the end of its files.

    Raises:
        ConfigError: naming what is wrong.
    """
    kind, _, rest = word.partition(":")
    keys: dict[str, Any] = {"kind": kind}
    if kind == "tail" and rest:
        keys |= {"paths": [rest], "stream": "tail", "follow": follow}
    elif kind == "stdin" and rest in {"", "lines", "json"}:
        keys["format"] = rest or "lines"
    elif kind == "generator" and rest:
        rate, _, count = rest.partition(":")
        keys["rate_per_s"] = _number(word, rate)
        if count:
            keys["count"] = int(_number(word, count))
    elif word != "host":
        raise ConfigError(f"--source {word}: expected {_SOURCES}")
    if stream is not None:
        keys["stream"] = stream
    return keys


def _number(word: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"--source {word}: {text!r} is not a number") from error
