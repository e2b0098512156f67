r"""Token ids by content hash, in memory-mapped append-only arenas.

File format (little-endian), `tokens-0.arena` and `tokens-1.arena`:

    header, 64 bytes: magic "SLTOK1\0\0" | id width u8 (2 or 4) + 7 zero bytes | generation u64 |
                      tokenizer version, 32 bytes | crc32 of the foregoing 56 bytes u32 | 4 zero bytes
    entry:            crc32 of the rest u32 | ids u32 | dropped u32 | key, 16 bytes | ids * width bytes,
    padded to 4

The arenas take turns: when the active one is full, the older one is emptied and becomes active, so that
memory and disk are bounded and the recent half survives. An arena ends at its first entry whose checksum
does not hold: a torn write after a crash loses its tail, which is tokenised again. A file of another
tokenizer, width or format is emptied. Each read verifies its entry, so a damaged page is a miss and never
wrong tokens.

The ids can be turned back into text: without a directory the arenas are anonymous memory; with one, it has
mode 0700. One process writes a directory (`flock`); another one that finds it taken keeps its cache in
memory.
"""

import fcntl
import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_MAGIC: Final = b"SLTOK1\0\0"
_HEADER: Final = struct.Struct("<8sB7xQ32sI4x")
_ENTRY: Final = struct.Struct("<III16s")
KEY_BYTES: Final = 16


class _Arena:
    """One append-only region: a header and entries."""

    def __init__(self, buffer: mmap.mmap, width: int, version: bytes) -> None:
        self.buffer = buffer
        self.width = width
        self._version = version
        self.generation = 0
        self.end = _HEADER.size

    def open(self) -> bool:
        """Reads the header. False when the content is not ours to use."""
        magic, width, generation, version, crc = _HEADER.unpack_from(self.buffer, 0)
        good = crc == zlib.crc32(self.buffer[:56]) and magic == _MAGIC
        if not good or width != self.width or version != self._version:
            return False
        self.generation = generation
        return True

    def clear(self, generation: int) -> None:
        """Empties it. The first entry is made unreadable before the header says that the arena is new."""
        self.buffer[_HEADER.size : _HEADER.size + _ENTRY.size] = bytes(_ENTRY.size)
        header = _HEADER.pack(_MAGIC, self.width, generation, self._version, 0)[:56]
        self.buffer[: _HEADER.size] = header + struct.pack("<I4x", zlib.crc32(header))
        self.generation = generation
        self.end = _HEADER.size

    def scan(self, entries_max: int) -> dict[bytes, int]:
        """Offsets by key of the whole entries, at most `entries_max`; sets the end behind the last of them."""
        offsets: dict[bytes, int] = {}
        self.end = _HEADER.size
        while len(offsets) < entries_max and (entry := self._read(self.end)) is not None:
            offsets[entry[0]] = self.end
            self.end += self._size(len(entry[1]))
        return offsets

    def append(self, key: bytes, body: bytes, dropped: int) -> int | None:
        """Writes an entry; its offset, or None when there is no room."""
        size = self._size(len(body))
        offset = self.end
        if offset + size > len(self.buffer):
            return None
        rest = _ENTRY.pack(0, len(body) // self.width, dropped, key)[4:] + body
        self.buffer[offset + 4 : offset + 4 + len(rest)] = rest
        # An old generation's entry may begin right behind: unreadable, unless it is still whole and in
        # place. It is not believed, because its key is not in the index and the next append overwrites it;
        # a restart would believe it, so the place of the next checksum is cleared first.
        if offset + size + 4 <= len(self.buffer):
            self.buffer[offset + size : offset + size + 4] = bytes(4)
        self.buffer[offset : offset + 4] = struct.pack("<I", zlib.crc32(rest))
        self.end = offset + size
        return offset

    def get(self, key: bytes, offset: int) -> tuple[bytes, int] | None:
        """Body and dropped count of the entry at `offset`, or None when it is damaged."""
        entry = self._read(offset)
        return (entry[1], entry[2]) if entry is not None and entry[0] == key else None

    def _read(self, offset: int) -> tuple[bytes, bytes, int] | None:
        if offset + _ENTRY.size > len(self.buffer):
            return None
        crc, ids, dropped, key = _ENTRY.unpack_from(self.buffer, offset)
        start, stop = offset + _ENTRY.size, offset + _ENTRY.size + ids * self.width
        if ids == 0 or stop > len(self.buffer) or zlib.crc32(self.buffer[offset + 4 : stop]) != crc:
            return None
        return key, self.buffer[start:stop], dropped

    def _size(self, body_bytes: int) -> int:
        return _ENTRY.size + (body_bytes + 3) // 4 * 4


class TokenCache:
    """A bounded map from content hash to token ids. Not thread-safe: one thread owns it.

    Args:
        bytes_max: of both arenas together.
        entries_max: entries in the index of both arenas together.
        version: identifies tokenizer and truncation, up to 32 bytes.
        width: bytes per id: 2 when the vocabulary has at most 65,536 entries, else 4.
        directory: where the arenas live; None keeps them in memory.
    """

    def __init__(
        self, *, bytes_max: int, entries_max: int, version: bytes, width: int, directory: Path | None = None
    ) -> None:
        assert width in {2, 4}
        assert len(version) <= 32
        arena_bytes = max(bytes_max // 2, 4096) // mmap.PAGESIZE * mmap.PAGESIZE
        self._entries_max = max(1, entries_max // 2)
        self._lock_file = _lock(directory) if directory else None
        # Taken by another process (or no directory): in memory.
        self.persistent = self._lock_file is not None
        place = directory if self.persistent else None
        self._arenas = [_Arena(_map(place, i, arena_bytes), width, version.ljust(32, b"\0")) for i in (0, 1)]
        self._indexes: list[dict[bytes, int]] = [{}, {}]
        self.damaged = 0
        self._load()

    def __len__(self) -> int:
        return sum(len(index) for index in self._indexes)

    def get(self, key: bytes) -> "tuple[npt.NDArray[np.int32], int] | None":
        """Ids (int32, a copy) and the number of tokens that truncation dropped, or None."""
        import numpy as np

        for arena, index in zip(self._arenas, self._indexes, strict=True):
            offset = index.get(key)
            if offset is None:
                continue
            found = arena.get(key, offset)
            if found is None:
                self.damaged += 1
                del index[key]
                continue
            return np.frombuffer(found[0], "<u2" if arena.width == 2 else "<u4").astype(np.int32), found[1]
        return None

    def put(self, key: bytes, ids: "npt.NDArray[np.int32]", dropped: int) -> None:
        """Remembers `ids` (not empty); what is larger than an arena is not remembered."""
        assert len(key) == KEY_BYTES
        arena, index = self._arenas[self._active], self._indexes[self._active]
        body = ids.astype("<u2" if arena.width == 2 else "<u4").tobytes()
        offset = arena.append(key, body, dropped) if len(index) < self._entries_max else None
        if offset is None:
            self._turn()
            arena, index = self._arenas[self._active], self._indexes[self._active]
            offset = arena.append(key, body, dropped)
        if offset is not None:
            index[key] = offset

    def close(self) -> None:
        """Releases files and memory. Idempotent."""
        for arena in self._arenas:
            arena.buffer.close()
        self._indexes = [{}, {}]
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def _load(self) -> None:
        for arena, index in zip(self._arenas, self._indexes, strict=True):
            if arena.open():
                index.update(arena.scan(self._entries_max))
            else:
                arena.clear(generation=0)
        self._active = 0 if self._arenas[0].generation >= self._arenas[1].generation else 1

    def _turn(self) -> None:
        generation = self._arenas[self._active].generation + 1
        self._active = 1 - self._active
        self._indexes[self._active].clear()
        self._arenas[self._active].clear(generation)


def _lock(directory: Path) -> int | None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(directory / "tokens.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _map(directory: Path | None, number: int, size: int) -> mmap.mmap:
    if directory is None:
        return mmap.mmap(-1, size)
    descriptor = os.open(directory / f"tokens-{number}.arena", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size)
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
