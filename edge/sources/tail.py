"""Follows log files: one line is one record, with the label `file`.

The place in every file is a cursor that the spool stores in the transaction that stores the records before it, so a
restart, after kill -9 too, neither loses nor repeats a line. A rotated file is read to its end under whatever name it
has; after a restart it is looked for, by inode, beside its old name. `edge.sources.follow` has the details.

Event time is the time of reading: the agent does not guess at formats. What does not decode becomes U+FFFD.
"""

import asyncio
import contextlib
import fnmatch
import glob
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from edge.config import TailConfig
from edge.records import Chunk, serialize
from edge.sources.base import SourceContext, StopFlag, delivery
from edge.sources.follow import FollowedFile, Line, Place
from sluice.delivery import Delivery
from sluice.record import Record
from sluice.telemetry import Event

OPENED = Event(name="tail_opened", unit="files", help="Files that tail began to read.")
TRUNCATED = Event(name="tail_truncated", unit="files", help="Files that were truncated and are read from the start.")
GONE = Event(
    name="tail_gone", unit="files", help="Files that vanished before they were read to the end.", level="warning"
)
UNREADABLE = Event(name="tail_unreadable", unit="files", help="Files that could not be opened.", level="warning")
TOO_MANY = Event(name="tail_too_many", unit="files", help="Files beyond files_max, not read.", level="warning")

_CHUNK_BYTES: Final = 64 * 1024

Key = tuple[int, int]


@dataclass(slots=True)
class _Followed:
    """A file that is read. `orphan_since_s` is set while no configured path leads to it any more."""

    file: FollowedFile
    orphan_since_s: float | None = None


class TailSource:
    """See the module's docstring.

    Attributes:
        idle_polls: how often it looked at all files and found nothing new.
    """

    def __init__(self, config: TailConfig, context: SourceContext) -> None:
        self._config = config
        self._context = context
        self.idle_polls = 0
        self._stop = StopFlag()
        self._prefix = f"{config.identity}/"
        # Any byte may become U+FFFD, three bytes of UTF-8, and a part must still keep the limit.
        self._line_bytes_max = max(4, context.limits.text_bytes_max // 3)
        self._files: dict[Key, _Followed] = {}
        self._reported: set[str] = set()
        self._missing: dict[Key, None] = {}
        self._skipped: set[Key] = set()
        self._forgotten: list[Key] = []
        self._places = dict(self._stored_places())
        self._at_first_start = not self._places

    @property
    def name(self) -> str:
        """Its identity."""
        return self._config.identity

    def stop(self) -> None:
        """Ends it."""
        self._stop.set()

    async def deliveries(self) -> AsyncGenerator[Delivery[Chunk], None]:
        """Chunks of whole lines; with `follow = false` it ends when all files are read."""
        loop = asyncio.get_running_loop()
        try:
            while not self._stop.is_set:
                await asyncio.to_thread(self._discover, loop.time())
                busy = False
                for key in list(self._files):
                    chunk = await asyncio.to_thread(self._next_chunk, key, loop.time())
                    if chunk is not None:
                        busy = True
                        yield delivery(chunk)
                if busy:
                    continue
                self.idle_polls += 1
                if not self._config.follow:
                    return
                await self._stop.wait(self._config.poll_interval_s)
        finally:
            for followed in self._files.values():
                followed.file.close()
            self._files.clear()

    # --- which files

    def _stored_places(self) -> Iterator[tuple[Key, Place]]:
        for name, stored in self._context.cursors.items():
            if name.startswith(self._prefix):
                place = msgspec.json.decode(stored, type=Place)
                yield (place.device, place.inode), place

    def _discover(self, now_s: float) -> None:
        """Opens files that are new, and notes which ones lost their path."""
        current: dict[Key, Path] = {}
        for path in self._matches():
            try:
                stat = path.stat()
            except OSError:
                continue
            current.setdefault((stat.st_dev, stat.st_ino), path)
        for key, followed in self._files.items():
            if key in current:
                followed.file.path = current[key]
                followed.orphan_since_s = None
            elif followed.orphan_since_s is None:
                followed.orphan_since_s = now_s
        for key, path in current.items():
            if key not in self._files:
                self._open(key, path, now_s, orphan=False)
        self._find_rotated(current, now_s)
        self._at_first_start = False

    def _matches(self) -> Iterator[Path]:
        config = self._config
        for pattern in config.paths:
            for name in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207 - absolute and relative patterns
                path = Path(name)
                # A path that was given by name is wanted, whatever it is called.
                excluded = name != pattern and any(fnmatch.fnmatch(path.name, glob_) for glob_ in config.exclude)
                if not excluded and path.is_file():
                    yield path

    def _open(self, key: Key, path: Path, now_s: float, *, orphan: bool) -> None:
        """Opens a file where its reading stood. One that cannot be opened now keeps its place for the next look."""
        place = self._places.get(key)
        if len(self._files) >= self._config.files_max:
            self._report(TOO_MANY, path, files_max=self._config.files_max)
            return
        try:
            file = FollowedFile(path, place, self._line_bytes_max)
        except OSError as error:
            self._report(UNREADABLE, path, detail=error.strerror)
            return
        self._places.pop(key, None)
        self._missing.pop(key, None)
        if place is None and self._at_first_start:
            self._skip(file)
            self._skipped.add(file.key)
        self._files[file.key] = _Followed(file, now_s if orphan else None)
        self._context.telemetry.emit(OPENED, file=str(path), offset=file.place.offset, source=self.name)

    def _skip(self, file: FollowedFile) -> None:
        """Passes over what a file held before the agent knew it, as configured."""
        if self._config.start_at == "end":
            file.skip_to_end()
        elif self._config.backlog_bytes_max is not None:
            file.skip_to_last(self._config.backlog_bytes_max)

    def _find_rotated(self, current: Mapping[Key, Path], now_s: float) -> None:
        """After a restart: files that were read before and have another name now.

        One that is nowhere may come back (a file system that is not mounted yet), so its place is kept; of those only
        `files_max`, the ones found missing first going first.
        """
        for key, place in list(self._places.items()):
            if key in current or key in self._missing:
                continue  # it is there, and could not be opened yet; or it was looked for already
            path = _renamed(place, key)
            if path is not None:
                self._open(key, path, now_s, orphan=True)
                continue
            self._report(GONE, Path(place.path), offset=place.offset)
            self._missing[key] = None
        for key in list(self._missing)[: max(0, len(self._missing) - self._config.files_max)]:
            del self._missing[key], self._places[key]
            self._forgotten.append(key)

    def _report(self, event: Event, path: Path, **fields: Any) -> None:
        """Emits an event once per file."""
        if str(path) not in self._reported:
            self._reported.add(str(path))
            self._context.telemetry.emit(event, file=str(path), source=self.name, **fields)

    # --- their lines

    def _next_chunk(self, key: Key, now_s: float) -> Chunk | None:
        """The next lines of a file, or the end of its story."""
        followed = self._files[key]
        file = followed.file
        if file.check():
            self._context.telemetry.emit(TRUNCATED, file=str(file.path), source=self.name)
        lines = file.read(_CHUNK_BYTES, final=self._is_final(followed, now_s))
        cursors: dict[str, bytes | None] = {self._cursor(gone): None for gone in self._forgotten}
        self._forgotten.clear()
        if lines or key in self._skipped:
            # A place that was skipped to is stored without a line too: a restart must not begin before it.
            self._skipped.discard(key)
            cursors[self._cursor(key)] = msgspec.json.encode(file.place)
        elif self._is_finished(followed, now_s):
            cursors[self._cursor(key)] = None
            file.close()
            del self._files[key]
        if not cursors:
            return None
        now_us = self._context.now_us()
        frames = [self._frame(line, file.path, now_us) for line in lines]
        return Chunk(self._config.key, frames, now_us, cursors=cursors)

    def _is_final(self, followed: _Followed, now_s: float) -> bool:
        """Whether a last line without an end counts as one."""
        return not self._config.follow or self._is_finished(followed, now_s)

    def _is_finished(self, followed: _Followed, now_s: float) -> bool:
        since = followed.orphan_since_s
        return since is not None and now_s - since >= self._config.rotate_wait_s

    def _frame(self, line: Line, path: Path, now_us: int) -> bytes:
        text = line.data.removesuffix(b"\r").decode(self._config.encoding, "replace")
        labels = {"file": str(path)}
        if line.part:
            labels["part"] = str(line.part)
        return serialize(Record(now_us, text=text, labels=labels), self._context.limits)

    def _cursor(self, key: Key) -> str:
        return f"{self._prefix}{key[0]}:{key[1]}"


def _renamed(place: Place, key: Key) -> Path | None:
    """The file that had this place, under the name that rotation gave it, or None."""
    old = Path(place.path)
    for path in sorted(old.parent.glob(f"{glob.escape(old.name)}*")):
        with contextlib.suppress(OSError):  # rotated or removed since the folder was listed
            stat = path.stat()
            if (stat.st_dev, stat.st_ino) == key:
                return path
    return None
