"""A log file that cannot grow without bound: the newest output is kept, the oldest goes.

Two files, `NAME` and `NAME.1`, of half the limit each; when the first is full it replaces the second. A write that
fails (disk full) is counted and dropped: a log must never stop the process that it is about.
"""

from pathlib import Path
from typing import BinaryIO


class BoundedLog:
    """Not thread-safe: one writer.

    Args:
        path: of the newest half; its folder must exist.
        bytes_max: of both halves together.
    """

    def __init__(self, path: Path, bytes_max: int) -> None:
        assert bytes_max >= 2, "room for at least a byte in each half"
        self.path = path
        self.bytes_dropped = 0
        self._half_bytes_max = bytes_max // 2
        self._file: BinaryIO = path.open("ab")
        self._bytes = self._file.tell()

    @property
    def older_path(self) -> Path:
        """Of the older half; it may not exist."""
        return self.path.with_name(self.path.name + ".1")

    def write(self, chunk: bytes) -> None:
        """Appends; of a chunk larger than half the limit only the end is kept."""
        dropped = max(0, len(chunk) - self._half_bytes_max)
        self.bytes_dropped += dropped
        chunk = chunk[dropped:]
        try:
            if self._bytes + len(chunk) > self._half_bytes_max:
                self._rotate()
            self._file.write(chunk)
            self._file.flush()
            self._bytes += len(chunk)
        except OSError:
            self.bytes_dropped += len(chunk)

    def close(self) -> None:
        """Closes the file."""
        try:
            self._file.close()
        except OSError:
            self.bytes_dropped += 1

    def _rotate(self) -> None:
        self._file.close()
        self.path.replace(self.older_path)
        self._file = self.path.open("wb")
        self._bytes = 0


def tail(path: Path, lines_max: int = 20) -> str:
    """The last lines of a log, for an error message; empty when there is none."""
    try:
        text = path.read_bytes()[-64 * 1024 :].decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines_max:])
