"""A file's lines as texts, and how far one is with them. Bounded, whatever the file holds.

Bytes that are not UTF-8 become lone surrogates, so that the line they are in is refused by name and no other.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import BinaryIO, Final

from sluice.client.analyzing import TEXT_BYTES_MAX

_BAR_CHARS: Final = 24
_PIECE_BYTES: Final = 1 << 16


class Lines:
    """The lines that are not empty, of bytes.

    Of a line longer than `TEXT_BYTES_MAX` only so much is kept that it is seen to be too long.

    Args:
        content: read from where it is.
    """

    def __init__(self, content: BinaryIO) -> None:
        self._content = content
        self._line = 0
        self._bytes = 0
        self._given: deque[tuple[int, int]] = deque()  # at most as many as a call has under way

    def __iter__(self) -> Iterator[str]:
        while (line := self._read()) is not None:
            if text := line.rstrip(b"\r\n"):
                self._given.append((self._line, self._bytes))
                yield text.decode(errors="surrogateescape")

    def taken(self) -> tuple[int, int]:
        """Number (from 1) of the earliest line that was given and not taken yet, and the bytes up to its end."""
        return self._given.popleft()

    def _read(self) -> bytes | None:
        line = self._content.readline(TEXT_BYTES_MAX + 2)
        if not line:
            return None
        self._line += 1
        self._bytes += len(line)
        piece = line
        while not piece.endswith(b"\n") and (piece := self._content.readline(_PIECE_BYTES)):
            self._bytes += len(piece)
        return line


class Progress:
    """One line that says how far a call is.

    Args:
        write: shows a line in the place of the last one.
        clock: monotonic seconds.
        bytes_total: of the file; 0 when nobody knows.
        every_s: between two lines.
    """

    def __init__(
        self, write: Callable[[str], None], clock: Callable[[], float], bytes_total: int = 0, every_s: float = 0.1
    ) -> None:
        self._write = write
        self._clock = clock
        self._bytes_total = bytes_total
        self._every_s = every_s
        self._begun_s = clock()
        self._shown_s = -every_s
        self.count = 0
        self.failed = 0

    def answered(self, failed: bool, bytes_done: int) -> None:
        """A text has its answer; the file was read up to `bytes_done`."""
        self.count += 1
        self.failed += failed
        now_s = self._clock()
        if now_s - self._begun_s - self._shown_s >= self._every_s:
            self._shown_s = now_s - self._begun_s
            self._write(progress_line(self.count, self.failed, self._shown_s, bytes_done, self._bytes_total))

    def end(self) -> None:
        """Takes the line away."""
        self._write("")


def progress_line(count: int, failed: int, seconds: float, bytes_done: int, bytes_total: int) -> str:
    """Bar, share and time left (where the total is known), texts, their rate, and how many failed."""
    parts = []
    if bytes_total:
        share = min(1.0, bytes_done / bytes_total)
        full = int(_BAR_CHARS * share)
        parts.append(f"[{'#' * full}{'-' * (_BAR_CHARS - full)}] {share:4.0%}")
        if 0 < share < 1 and seconds > 0:
            parts.append(f"{_duration(seconds / share - seconds)} left")
    rate = f" ({count / seconds:,.0f}/s)" if seconds > 0 else ""
    parts.append(f"{count:,} texts{rate}")
    if failed:
        parts.append(f"{failed:,} failed")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
