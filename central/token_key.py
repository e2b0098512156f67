"""The key that signs resume tokens: 32 bytes as 64 hex digits in a file that only its owner may read.

It is made once and kept: with a new key every client would have to start anew. Instances that clients may move between
share one file (`feed.token_key_file`).

Fails: `ConfigError` naming the file.
"""

import os
import secrets
from pathlib import Path

from central.tokens import KEY_BYTES
from sluice.errors import ConfigError

FILE_NAME = "feed-token.key"


def load_key(key_file: str | None, state_dir: str) -> bytes:
    """The configured key, or the one in `state_dir`, which is made when it is missing."""
    if key_file is not None:
        return read_key(Path(key_file))
    path = Path(state_dir) / FILE_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            _create(path)
    except OSError as error:
        raise ConfigError(f"state_dir: cannot keep the feed's token key in {path}: {error.strerror}") from error
    return read_key(path)


def _create(path: Path) -> None:
    """Writes a new key whole or not at all; when two processes do it at once, one of the two keys stays."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(secrets.token_hex(KEY_BYTES) + "\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(draft, path)
    except FileExistsError:
        pass  # another process was first: its key is as good
    finally:
        draft.unlink()


def read_key(path: Path) -> bytes:
    """The key in a file.

    Raises:
        ConfigError: naming the file, when it is not there or holds something else.
    """
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except OSError as error:
        raise ConfigError(f"feed token key: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"feed token key: {path} does not hold hexadecimal digits") from error
    if len(key) != KEY_BYTES:
        raise ConfigError(f"feed token key: {path} holds {len(key)} bytes instead of {KEY_BYTES}")
    return key
