"""What streams usually say, kept in a file: a restart forgets at most what was learnt since the last saving.

The file lies beside the other caches, which like it hold content: from a vector, a text can partly be guessed. It is
written beside and renamed, so it is always a whole one. Processes that share a directory each know what they have seen
themselves; the next start begins with what was saved last.

A stream that is skipped is in no file that is saved from then on, and `load` saves the file anew when it holds one.
With '*', saving removes the file.

Fails: never. A file that is damaged, or of another model or other settings, is told and written anew; a directory that
cannot be used is told at every saving.
"""

import os
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from engine.config import CacheConfig
from engine.novelty import Novelty

NAME: Final = "streams.novelty"
# No saving lasts that long, in seconds: what is unfinished and older was cut short.
STALE_S: Final = 3600.0


class NoveltyFile:
    """The file of one model's novelty.

    Args:
        config: of the caches; `directory` is set, and created with mode 0700.
        novelty: what is kept, but for `config.skip_streams`.
        on_damage: told what could not be read or written.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: CacheConfig,
        novelty: Novelty,
        on_damage: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = Path(config.directory) / NAME
        self._skip = frozenset(config.skip_streams)
        self._every_s = config.novelty_save_s
        self._novelty = novelty
        self._on_damage = on_damage
        self._clock = clock
        self._saved_texts = self._packed_texts = 0
        self._packed_s = clock()

    @property
    def changed(self) -> bool:
        """Whether there is something to save."""
        return self._novelty.texts != self._saved_texts

    @property
    def due(self) -> bool:
        """Whether it should be saved now."""
        return self.changed and self._clock() >= self._packed_s + self._every_s

    def load(self, *, write: bool = True) -> None:
        """Knows again what was saved, but for streams that are skipped now; on the thread that owns the novelty.

        Args:
            write: whether skipped streams leave the file at once, which no other model may write to then.
        """
        try:
            self._sweep()
            outdated = "*" in self._skip or self._read()
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            self._on_damage(f"novelty: {self._file} is not used, all streams are new: {_why(error)}")
            # Who is in a file that means nothing here is not known.
            outdated = isinstance(error, ValueError) and bool(self._skip)
        if outdated:
            self.outdate()  # until that is written
            if write:
                self.write(self.pack())

    def outdate(self) -> None:
        """What is saved may hold streams that are skipped now: there is something to save."""
        self._saved_texts = -1

    def pack(self) -> bytes:
        """What is to be saved, nothing when all streams are skipped; on the thread that owns the novelty."""
        self._packed_texts, self._packed_s = self._novelty.texts, self._clock()
        return b"" if "*" in self._skip else self._novelty.pack(self._skip)

    def write(self, data: bytes) -> None:
        """Saves it, on any thread. When that fails, it is tried again at the next saving."""
        packed_texts = self._packed_texts
        try:
            if data:
                self._replace(data)
            else:
                self._file.unlink(missing_ok=True)
        except OSError as error:
            self._on_damage(f"novelty: {self._file} cannot be written: {_why(error)}")
        else:
            self._saved_texts = packed_texts

    def _read(self) -> bool:
        """Whether the file holds streams that are skipped."""
        status = self._file.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > self._novelty.packed_bytes_max:
            raise ValueError("no memory of streams")
        self._novelty.unpack(self._file.read_bytes())
        return self._novelty.forget(self._skip)

    def _replace(self, data: bytes) -> None:
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, beside = tempfile.mkstemp(prefix=f"{NAME}-", dir=self._file.parent)  # mode 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            Path(beside).rename(self._file)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise

    def _sweep(self) -> None:
        """Removes what is left of savings that were cut short: at once, where it may hold streams that are skipped."""
        for each in self._file.parent.glob(f"{NAME}-*"):
            with suppress(OSError):
                if self._skip or each.stat().st_mtime < time.time() - STALE_S:
                    each.unlink()


def _why(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
