"""Following one file: which bytes are lines, and whether the file is still the one that was read. No clock, no loop.

A file is known by device, inode and a fingerprint (length and crc32c of its beginning), since inodes are used again.
Its place is the offset behind the last byte that became a record. Rotation looks like this:
  * rename: the open file goes on under another name, and a new inode takes the old name;
  * copy-truncate: the size falls below the place, or the beginning is no longer what it was: the place is 0 again.
    What was written between the copy and the truncation is only in the copy (so says logrotate's manual, too).

A line longer than `text_bytes_max` is cut, at a character's border, into records with the label `part` = 1, 2, ...
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import google_crc32c
import msgspec

# How much of a file's beginning is compared.
FINGERPRINT_BYTES: Final = 256


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where the reading of a file stands; stored in the spool as JSON.

    Attributes:
        path: where it was seen last.
        offset: first byte that is not in a record yet.
        part: how many records the line at `offset` has given already; 0 at a line's beginning.
        fingerprint_bytes, fingerprint: length and crc32c of the file's beginning.
    """

    path: str
    device: int
    inode: int
    offset: int = 0
    part: int = 0
    fingerprint_bytes: int = 0
    fingerprint: int = 0


@dataclass(frozen=True, slots=True)
class Line:
    """A line, or a part of a long one (`part` counts from 1; 0 when it is whole)."""

    data: bytes
    part: int
    end_offset: int


class FollowedFile:
    """An open file and the place in it.

    Args:
        path: of the file.
        place: where to go on; None: at the beginning.
        text_bytes_max: longest line that is one record.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, place: Place | None, text_bytes_max: int) -> None:
        self.path = path
        self._text_bytes_max = text_bytes_max
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stat = os.fstat(self._handle)
        self.place = Place(path=str(path), device=stat.st_dev, inode=stat.st_ino)
        self.truncated = False
        if place is not None and (place.device, place.inode) == self.key and self._is_same(place, stat.st_size):
            self.place = msgspec.structs.replace(place, path=str(path))

    @property
    def key(self) -> tuple[int, int]:
        """Device and inode."""
        return self.place.device, self.place.inode

    @property
    def size_bytes(self) -> int:
        """Present size."""
        return os.fstat(self._handle).st_size

    @property
    def unread_bytes(self) -> int:
        """Bytes behind the place."""
        return max(0, self.size_bytes - self.place.offset)

    def skip_to_end(self) -> None:
        """Puts the place behind the last whole line, without reading what is before."""
        size = self.size_bytes
        at = max(0, size - self._text_bytes_max)
        tail = os.pread(self._handle, size - at, at)
        end = tail.rfind(b"\n")
        self.place = msgspec.structs.replace(self.place, offset=at + end + 1 if end >= 0 else at)
        self._renew_fingerprint()

    def skip_to_last(self, bytes_max: int) -> None:
        """Leaves at most `bytes_max` bytes in front of the end unread, from the beginning of a line on."""
        skipped = self.size_bytes - bytes_max
        if skipped <= 0:
            return
        # The byte before may be the end of a line, so that nothing of the next one is lost.
        around = os.pread(self._handle, self._text_bytes_max + 1, skipped - 1)
        end = around.find(b"\n")
        self.place = msgspec.structs.replace(self.place, offset=skipped + end if end >= 0 else skipped)
        self._renew_fingerprint()

    def check(self) -> bool:
        """Looks whether the file was truncated or rewritten; returns True when it begins anew."""
        if self._is_same(self.place, self.size_bytes):
            return False
        self.place = Place(path=str(self.path), device=self.place.device, inode=self.place.inode)
        return True

    def read(self, bytes_max: int, *, final: bool) -> list[Line]:
        """The next whole lines, from at most `bytes_max` bytes (more for one long line).

        Args:
            bytes_max: how much to read.
            final: nothing more will be written, so a last line without an end counts.
        """
        block = os.pread(self._handle, max(bytes_max, self._text_bytes_max + 2), self.place.offset)
        if not block:
            return []
        at_end = final and self.place.offset + len(block) >= self.size_bytes
        lines = list(self._lines(block, at_end))
        if lines:
            last = lines[-1]
            open_part = last.part if last.part and block[last.end_offset - self.place.offset - 1 :][:1] != b"\n" else 0
            self.place = msgspec.structs.replace(self.place, offset=last.end_offset, part=open_part)
            self._renew_fingerprint()
        return lines

    def close(self) -> None:
        """Closes the file."""
        os.close(self._handle)

    def _lines(self, block: bytes, at_end: bool) -> Iterator[Line]:
        limit = self._text_bytes_max
        at, part = 0, self.place.part
        while at < len(block):
            end = block.find(b"\n", at)
            if end >= 0 and end - at <= limit:
                yield self._line(block[at:end], part + 1 if part else 0, end + 1)
                at, part = end + 1, 0
            elif (end < 0 and len(block) - at > limit) or end - at > limit:
                cut = _cut(block, at, limit)
                yield self._line(block[at:cut], part + 1, cut)
                at, part = cut, part + 1
            elif at_end:
                yield self._line(block[at:], part + 1 if part else 0, len(block))
                return
            else:
                return

    def _line(self, data: bytes, part: int, end: int) -> Line:
        return Line(data, part, self.place.offset + end)

    def _is_same(self, place: Place, size: int) -> bool:
        if size < place.offset:
            return False
        head = os.pread(self._handle, place.fingerprint_bytes, 0)
        return len(head) == place.fingerprint_bytes and google_crc32c.value(head) == place.fingerprint

    def _renew_fingerprint(self) -> None:
        """Extends the fingerprint while the file is still short."""
        wanted = min(FINGERPRINT_BYTES, self.place.offset)
        if wanted > self.place.fingerprint_bytes:
            head = os.pread(self._handle, wanted, 0)
            crc = int(google_crc32c.value(head))
            self.place = msgspec.structs.replace(self.place, fingerprint_bytes=len(head), fingerprint=crc)


def _cut(block: bytes, start: int, limit: int) -> int:
    """Where to cut so that no UTF-8 character is split, if there is such a place near."""
    cut = start + limit
    for back in range(4):
        # A byte that does not continue a character begins one.
        if block[cut - back] & 0xC0 != 0x80:
            return cut - back
    return cut
