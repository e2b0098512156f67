r"""One memory-mapped append-only file of token ids by content hash: its format, its writer's and its readers' side.

Format (little-endian):

    header, 64 bytes: magic "SLTOK2\0\0" | id width u8 (2 or 4) + 7 zero bytes | generation u64 |
                      tokenizer version, 32 bytes | crc32 of the foregoing 56 bytes u32 | 4 zero bytes
    entry:            crc32 of the rest u32 | ids u32 | dropped u32 | key, 16 bytes | ids * width bytes,
    padded to 4

The checksum of an entry starts from that of the header, so it also holds the tokenizer's version, the width and
the generation: when an arena is emptied, which only writes a new header, every entry in it ceases to be one.

Invariants: an entry's checksum is written last, so an entry is whole or is not one: a torn write loses the tail of
an arena, and a reader in another process that is in the middle of it sees none. Whoever reads takes one copy and
verifies that, so a write at the same moment makes a miss and never wrong ids.

A file that shrinks under a mapping would kill the process (SIGBUS), and so would a disk that is full when a hole of
a sparse file is first written. So the blocks are reserved when a file is made, a file of another size is replaced
and never resized, and `Mapped.usable` says whether the file still has its size: asked before each batch, it leaves
only a window of microseconds to somebody who truncates the file by hand.
"""

import fcntl
import mmap
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Final

MAGIC: Final = b"SLTOK2\0\0"
KEY_BYTES: Final = 16
_HEADER: Final = struct.Struct("<8sB7xQ32sI4x")
_ENTRY: Final = struct.Struct("<III16s")
HEADER_BYTES: Final = _HEADER.size
LOCK_NAME: Final = "tokens.lock"


class Mapped:
    """A region of memory, with the file behind it if there is one."""

    def __init__(self, buffer: mmap.mmap, descriptor: int = -1) -> None:
        self.buffer = buffer
        self._descriptor = descriptor

    @property
    def usable(self) -> bool:
        """Whether the file is still there and as large as the region."""
        if self._descriptor < 0:
            return True
        status = os.fstat(self._descriptor)
        return status.st_nlink > 0 and status.st_size >= len(self.buffer)

    def close(self) -> None:
        """Releases it. Idempotent."""
        self.buffer.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Arena:
    """Header and entries in a region.

    Args:
        mapped: the region; this object closes it.
        width: bytes per id.
        version: of the tokenizer, 32 bytes.
    """

    def __init__(self, mapped: Mapped, width: int, version: bytes) -> None:
        self.mapped = mapped
        self.width = width
        self._buffer = mapped.buffer
        self._version = version
        self._seed = 0
        self.generation = 0
        self.end = HEADER_BYTES

    def header(self) -> int | None:
        """The generation that the header states; None when the content is not of this format, width and version."""
        head = self._buffer[:HEADER_BYTES]
        magic, width, generation, version, crc = _HEADER.unpack(head)
        if magic != MAGIC or crc != zlib.crc32(head[:56]) or width != self.width or version != self._version:
            return None
        return int(generation)

    def begin(self, generation: int) -> None:
        """Reads as an arena of that generation from now on, from its start."""
        self.generation = generation
        self._seed = zlib.crc32(self._head(generation))
        self.end = HEADER_BYTES

    def clear(self, generation: int) -> None:
        """Empties it: no entry of another generation verifies."""
        head = self._head(generation)
        self._buffer[:HEADER_BYTES] = head + struct.pack("<I4x", zlib.crc32(head))
        self.begin(generation)

    def scan(self, entries_max: int) -> dict[bytes, int]:
        """Offsets by key of the next whole entries, at most `entries_max`; moves the end behind the last of them."""
        offsets: dict[bytes, int] = {}
        for _ in range(entries_max):
            entry = self._read(self.end)
            if entry is None:
                break
            offsets[entry[0]] = self.end
            self.end += _size(len(entry[1]))
        return offsets

    def append(self, key: bytes, body: bytes, dropped: int) -> int | None:
        """Writes an entry; its offset, or None when there is no room."""
        size = _size(len(body))
        offset = self.end
        if offset + size > len(self._buffer):
            return None
        rest = _ENTRY.pack(0, len(body) // self.width, dropped, key)[4:] + body
        self._buffer[offset + 4 : offset + 4 + len(rest)] = rest
        self._buffer[offset : offset + 4] = zlib.crc32(rest, self._seed).to_bytes(4, "little")
        self.end = offset + size
        return offset

    def get(self, key: bytes, offset: int) -> tuple[bytes, int] | None:
        """Body and dropped count of the entry at `offset`, or None when it is damaged or gone."""
        entry = self._read(offset)
        return (entry[1], entry[2]) if entry is not None and entry[0] == key else None

    def close(self) -> None:
        """Releases the region. Idempotent."""
        self.mapped.close()

    def _head(self, generation: int) -> bytes:
        return _HEADER.pack(MAGIC, self.width, generation, self._version, 0)[:56]

    def _read(self, offset: int) -> tuple[bytes, bytes, int] | None:
        start = offset + _ENTRY.size
        if start > len(self._buffer):
            return None
        ids = int.from_bytes(self._buffer[offset + 4 : offset + 8], "little")
        stop = start + ids * self.width
        if not ids or stop > len(self._buffer):
            return None
        # One copy is verified and used: another process may write here at any moment.
        entry = self._buffer[offset:stop]
        crc, copied_ids, dropped, key = _ENTRY.unpack_from(entry)
        if copied_ids != ids or zlib.crc32(entry[4:], self._seed) != crc:
            return None
        return key, entry[_ENTRY.size :], dropped


def in_memory(size: int) -> Mapped:
    """A region without a file."""
    return Mapped(mmap.mmap(-1, size))


def for_writing(file: Path, size: int) -> Mapped:
    """A file of exactly `size` bytes with its blocks reserved; one of another size is replaced by an empty one.

    Raises:
        OSError: no permission, or no room on the disk.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    if not file.exists() or file.stat().st_size != size:
        # Readers keep the file that they have mapped, at its size.
        fresh = file.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, flags | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
        finally:
            os.close(descriptor)
        fresh.rename(file)
    descriptor = os.open(file, flags, 0o600)
    try:
        return Mapped(mmap.mmap(descriptor, size), descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def for_reading(file: Path) -> Mapped | None:
    """A read-only view of a writer's file; None when it is not there, or too small to be one."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        size = os.fstat(descriptor).st_size
        if size >= HEADER_BYTES:
            return Mapped(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ), descriptor)
    except OSError:
        pass
    os.close(descriptor)
    return None


def lock(directory: Path) -> int | None:
    """The right to write a directory, as a descriptor to keep open; None when another process has it.

    Raises:
        OSError: the directory cannot be made or used.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    if not os.fstat(descriptor).st_nlink:
        # Who removes a folder holds its lock: this one was removed between opening and locking it.
        os.close(descriptor)
        return None
    with suppress(OSError):
        os.utime(descriptor)  # when it was last begun to be used
    return descriptor


def _size(body_bytes: int) -> int:
    return _ENTRY.size + (body_bytes + 3) // 4 * 4
