"""The key of the sealed store, and the key service that Parquet's modular encryption asks for.

The key file holds 16 or 32 random bytes. Three master keys are derived from it (HMAC-SHA256 as in NIST SP 800-108):
`footer`, `identity` (who, when, which stream) and `content` (what it says and why it stayed). Every file has data keys
of its own, which pyarrow makes and which are wrapped by a master key with AES-GCM.

How it fails: `ConfigError` for a key file that is missing, of a wrong length or readable by everybody, and for a key
that is not the one the store was made with.
"""

import base64
import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sluice.errors import ConfigError

if TYPE_CHECKING:
    from pyarrow.parquet.encryption import CryptoFactory, KmsConnectionConfig

LENGTHS: Final = (16, 32)
FOOTER: Final = "footer"
IDENTITY: Final = "identity"
CONTENT: Final = "content"
_NONCE_BYTES: Final = 12


class SealedKey:
    """The key, as derived master keys.

    Args:
        secret: 16 or 32 random bytes.
    """

    def __init__(self, secret: bytes) -> None:
        assert len(secret) in LENGTHS, "checked where it was read"
        self._masters = {name: _derive(secret, f"master {name}") for name in (FOOTER, IDENTITY, CONTENT)}
        self.id = _derive(secret, "key id")[:8].hex()

    def __repr__(self) -> str:
        return f"SealedKey({self.id})"

    def wrap(self, data_key: bytes, master: str) -> bytes:
        """Encrypts a data key, bound to the master key's name."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        nonce = secrets.token_bytes(_NONCE_BYTES)
        return base64.b64encode(nonce + AESGCM(self._masters[master]).encrypt(nonce, data_key, master.encode()))

    def unwrap(self, wrapped: bytes, master: str) -> bytes:
        """The data key.

        Raises:
            ConfigError: when it was wrapped with another key, or was changed.
        """
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        sealed = base64.b64decode(wrapped)
        try:
            return AESGCM(self._masters[master]).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], master.encode())
        except (InvalidTag, KeyError) as error:
            raise ConfigError("sealed store: this file was sealed with another key, or was changed") from error

    def factory(self) -> "tuple[CryptoFactory, KmsConnectionConfig]":
        """What pyarrow makes file properties with."""
        from pyarrow.parquet.encryption import CryptoFactory, KmsClient, KmsConnectionConfig

        key = self

        class _Kms(KmsClient):  # type: ignore[misc]
            """Wraps and unwraps with this key."""

            def __init__(self, _config: Any) -> None:
                super().__init__()

            def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
                return key.wrap(key_bytes, master_key_identifier)

            def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
                return key.unwrap(wrapped_key, master_key_identifier)

        return CryptoFactory(_Kms), KmsConnectionConfig()


def load_key(path: Path, *, create: bool = False) -> tuple[SealedKey, bool]:
    """Reads the key file, or makes one.

    Returns:
        The key, and whether it was made now.

    Raises:
        ConfigError: naming the file and the way out.
    """
    made = create and not path.exists()
    if made:
        _create(path)
    try:
        mode, secret = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"local.key_file: cannot read {path}: {error.strerror}; make one with "
            f"`head -c 32 /dev/urandom > {path} && chmod 600 {path}`, or set local.key_create = true to try it out"
        ) from error
    if mode & 0o007:
        raise ConfigError(f"local.key_file: {path} can be read by everybody: chmod 600 {path}")
    if len(secret) not in LENGTHS:
        raise ConfigError(f"local.key_file: {path} has {len(secret)} bytes; it must have exactly 16 or 32 random ones")
    return SealedKey(secret), made


def check_identity(directory: Path, key: SealedKey, read: Mapping[str, Any] | None) -> None:
    """Raises ConfigError when a store was made with another key.

    Args:
        directory: for the message.
        key: the one at hand.
        read: what the store says of itself, or None when it is new.
    """
    if read is not None and read.get("key_id") != key.id:
        raise ConfigError(
            f"sealed store {directory} was made with key {read.get('key_id')}, the key file holds {key.id}: "
            "bring the right local.key_file, or choose a new local.directory"
        )


def _create(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"local.key_file: cannot make {path}: {error.strerror}") from error


def _derive(secret: bytes, purpose: str) -> bytes:
    return hmac.new(secret, b"sluice sealed v1\0" + purpose.encode(), hashlib.sha256).digest()
