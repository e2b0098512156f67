"""Resume tokens: where a subscription stands in every partition, signed. Pure.

Format: `version (1 byte) | key id (4 bytes) | msgpack body | HMAC-SHA256 (32 bytes) of all before it`. The body is
`[not_before_us, [[topic, [[partition, offset, index], ...]], ...]]`.

A token is opaque to clients and comes back from the network, so nothing of it is read before its signature is verified.
The key id tells "issued by another server" from "damaged"; both are refused with a text that says which.
"""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import msgspec

from sluice.errors import Permanent

KEY_BYTES: Final = 32
TOKEN_BYTES_MAX: Final = 64 * 1024
_VERSION: Final = b"\x01"
_KEY_ID_BYTES: Final = 4
_MAC_BYTES: Final = 32
_HEAD_BYTES: Final = len(_VERSION) + _KEY_ID_BYTES

Partition = tuple[str, int]  # topic, partition


class Position(NamedTuple):
    """The next thing to send of a partition: the entry at `offset`, from its record number `index` on."""

    offset: int
    record_index: int = 0


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """What a token says.

    Attributes:
        positions: the next position of every partition of the subscription.
        not_before_us: entries appended before this time are left out; 0 for none.
    """

    positions: Mapping[Partition, Position]
    not_before_us: int = 0


class TokenSigner:
    """Issues and opens tokens.

    Args:
        key: 32 random bytes; every instance that is to accept the token needs the same.
    """

    def __init__(self, key: bytes) -> None:
        assert len(key) == KEY_BYTES, f"a token key has {KEY_BYTES} bytes"
        self._key = key
        self._head = _VERSION + hashlib.sha256(b"sluice resume token" + key).digest()[:_KEY_ID_BYTES]

    def issue(self, point: ResumePoint) -> bytes:
        """The signed token of a point."""
        topics: dict[str, list[tuple[int, int, int]]] = {}
        for (topic, partition), position in point.positions.items():
            topics.setdefault(topic, []).append((partition, *position))
        signed = self._head + msgspec.msgpack.encode((point.not_before_us, list(topics.items())))
        return signed + hmac.digest(self._key, signed, "sha256")

    def open(self, token: bytes) -> ResumePoint:
        """Verifies a token and reads it.

        Raises:
            Permanent: saying whether it is damaged, from another server, or of another version.
        """
        if not _HEAD_BYTES + _MAC_BYTES < len(token) <= TOKEN_BYTES_MAX:
            raise Permanent(f"resume token: not a token ({len(token)} bytes)")
        if token[:1] != _VERSION:
            raise Permanent(f"resume token: unknown version {token[0]}")
        if not hmac.compare_digest(token[:_HEAD_BYTES], self._head):
            raise Permanent("resume token: it was issued by another server (feed.token_key_file differs)")
        signed, mac = token[:-_MAC_BYTES], token[-_MAC_BYTES:]
        if not hmac.compare_digest(hmac.digest(self._key, signed, "sha256"), mac):
            raise Permanent("resume token: its signature is wrong; it was damaged or forged")
        not_before_us, topics = msgspec.msgpack.decode(
            signed[_HEAD_BYTES:], type=tuple[int, list[tuple[str, list[tuple[int, int, int]]]]]
        )
        positions = {(topic, partition): Position(o, i) for topic, rows in topics for partition, o, i in rows}
        return ResumePoint(positions, not_before_us)
