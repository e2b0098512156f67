"""Model outputs by content, kept for a while.

What is cached is the model's output (an embedding, or logits), not the verdict: tasks read their verdict
from it anew, so `embed`, `classify` and `novelty` of one text share an entry. The key is content hash +
model version + head.

Value format (little-endian): tokens u32 | dropped u32 | dtype code u8 | ndim u8 | shape u32 each | the
array's bytes.

Two stores with one behaviour: memory (the default, leaves no trace) and disk (diskcache with a bytes-only
Disk: its default unpickles what it finds, CVE-2025-69872). Both are bounded by bytes and by age. Not
thread-safe: one thread owns a store.
"""

import functools
import struct
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_HEAD: Final = struct.Struct("<IIBB")
_LENGTH: Final = struct.Struct("<I")
_DTYPES: Final = ("<f2", "<f4")
# What a dictionary entry, key and bytes object cost beside the value, in bytes.
_OVERHEAD: Final = 200


@functools.cache
def _numpy() -> Any:
    """`numpy.frombuffer` and the types: looking them up on every hit costs as much as the rest of it."""
    import numpy as np

    return np.frombuffer, tuple(np.dtype(name) for name in _DTYPES)


@dataclass(frozen=True, slots=True)
class Output:
    """What the model made of one text.

    Attributes:
        row: float16 or float32; a vector, or one vector per token.
        tokens: tokens the model saw.
        dropped: tokens that truncation took away.
    """

    row: "npt.NDArray[np.floating[Any]]"
    tokens: int
    dropped: int

    def pack(self) -> bytes:
        """As bytes."""
        code = _DTYPES.index(self.row.dtype.str)
        shape = struct.pack(f"<{self.row.ndim}I", *self.row.shape)
        return _HEAD.pack(self.tokens, self.dropped, code, self.row.ndim) + shape + self.row.tobytes()

    @classmethod
    def unpack(cls, data: bytes) -> "Output | None":
        """From bytes; None when they are not what `pack` wrote."""
        read, dtypes = _numpy()
        try:
            tokens, dropped, code, ndim = _HEAD.unpack_from(data)
            row = read(data, dtypes[code], offset=_HEAD.size + 4 * ndim)
            if ndim == 1:  # an embedding, nearly always: a third faster than with a shape
                return cls(row, tokens, dropped) if len(row) == _LENGTH.unpack_from(data, _HEAD.size)[0] else None
            return cls(row.reshape(struct.unpack_from(f"<{ndim}I", data, _HEAD.size)), tokens, dropped)
        except (struct.error, IndexError, ValueError):
            return None


class ResultStore(Protocol):
    """Bytes by key, bounded in size and age."""

    def get(self, key: bytes) -> bytes | None:
        """The value, or None when it is unknown, too old or damaged."""
        ...

    def put(self, key: bytes, value: bytes) -> None:
        """Remembers a value; older ones may go."""
        ...

    def close(self) -> None:
        """Releases it. Idempotent."""
        ...


class MemoryResults:
    """In memory, least recently used first out.

    Args:
        bytes_max: of keys, values and what they cost beside.
        ttl_s: age at which a value is forgotten.
        clock: monotonic seconds.
    """

    def __init__(self, bytes_max: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._bytes_max = bytes_max
        self._ttl_s = ttl_s
        self._clock = clock
        self._values: OrderedDict[bytes, tuple[float, bytes]] = OrderedDict()
        self.bytes = 0

    def get(self, key: bytes) -> bytes | None:
        """See `ResultStore`."""
        entry = self._values.get(key)
        if entry is None:
            return None
        if entry[0] <= self._clock():
            self._drop(key)
            return None
        self._values.move_to_end(key)
        return entry[1]

    def put(self, key: bytes, value: bytes) -> None:
        """See `ResultStore`."""
        if key in self._values:
            self._drop(key)
        size = len(key) + len(value) + _OVERHEAD
        if size > self._bytes_max:
            return
        self._values[key] = (self._clock() + self._ttl_s, value)
        self.bytes += size
        while self.bytes > self._bytes_max:
            self._drop(next(iter(self._values)))

    def close(self) -> None:
        """See `ResultStore`."""
        self._values.clear()
        self.bytes = 0

    def _drop(self, key: bytes) -> None:
        _, value = self._values.pop(key)
        self.bytes -= len(key) + len(value) + _OVERHEAD


class DiskResults:
    """On disk, survives restarts. A damaged database is a cold cache, never an error.

    Args:
        directory: its own; created with mode 0700.
        bytes_max: of the database.
        ttl_s: age at which a value is forgotten.
        on_damage: called when something could not be read or written.
    """

    def __init__(
        self, directory: Path, bytes_max: int, ttl_s: float, on_damage: Callable[[str], None] = lambda _: None
    ) -> None:
        self._ttl_s = ttl_s
        self._on_damage = on_damage
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._cache = _open(directory, bytes_max)
        except Exception as error:  # noqa: BLE001 - sqlite3 and diskcache raise many kinds
            on_damage(f"result cache is started afresh: {type(error).__name__}")
            for file in directory.glob("cache.db*"):
                file.unlink()
            self._cache = _open(directory, bytes_max)

    def get(self, key: bytes) -> bytes | None:
        """See `ResultStore`."""
        try:
            stored = self._cache.get(key.hex())
        except Exception as error:  # noqa: BLE001 - a cache that cannot be read is a miss
            self._on_damage(f"result cache cannot be read: {type(error).__name__}")
            return None
        if not isinstance(stored, bytes) or len(stored) < 4:
            return None
        if zlib.crc32(stored[4:]) != int.from_bytes(stored[:4], "little"):
            self._on_damage("result cache: checksum does not hold")
            return None
        return stored[4:]

    def put(self, key: bytes, value: bytes) -> None:
        """See `ResultStore`."""
        try:
            self._cache.set(key.hex(), zlib.crc32(value).to_bytes(4, "little") + value, expire=self._ttl_s)
        except Exception as error:  # noqa: BLE001 - a full disk must not stop inference
            self._on_damage(f"result cache cannot be written: {type(error).__name__}")

    def close(self) -> None:
        """See `ResultStore`."""
        self._cache.close()


def _open(directory: Path, bytes_max: int) -> Any:
    import diskcache

    class BytesDisk(diskcache.Disk):  # type: ignore[misc] # diskcache ships no types
        """Text keys and bytes in the database file; anything else is refused, and nothing is ever unpickled."""

        def put(self, key: object) -> tuple[str, bool]:
            assert type(key) is str
            return key, True

        def get(self, key: object, raw: object) -> object:
            if not raw:
                raise ValueError("a pickled key is refused")
            return key

        def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, bytes]:
            assert type(value) is bytes
            return 0, diskcache.core.MODE_RAW, None, value

        def fetch(self, mode: int, filename: object, value: object, read: object) -> bytes:
            if mode != diskcache.core.MODE_RAW or filename is not None or type(value) is not bytes:
                raise ValueError("a value that is not raw bytes is refused")
            return value

    # Losing the last seconds of a cache at a power cut costs nothing: no fsync (synchronous = 0). Least
    # recently *stored*: the alternatives write on every read.
    cache = diskcache.Cache(
        str(directory),
        disk=BytesDisk,
        size_limit=bytes_max,
        eviction_policy="least-recently-stored",
        cull_limit=16,
        sqlite_synchronous=0,
        statistics=0,
        tag_index=False,
    )
    (directory / "cache.db").chmod(0o600)
    return cache
