"""Token ids by content hash, bounded, kept across restarts and shared by processes.

Two arenas (see `token_arena` for the file format) take turns: when the active one is full, the older one is emptied
and becomes active, so memory and disk are bounded and the recent half survives. Each read verifies its entry, so a
damaged page is a miss and never wrong tokens.

The ids can be turned back into text: without a directory the arenas are anonymous memory; with one, it has mode
0700. Each tokenizer has a folder of its own in it, so that several models may share one configuration; the folders of
the `VERSIONS_MAX` tokenizers used last are kept.

One cache writes a folder (`flock`). Any other one, in this process or another, maps the same arenas read-only, follows
what the writer appends whenever `refresh` is called, and keeps what it had to tokenise itself in memory, within the
same bounds. When the writer ends, one of its readers takes its place (each tries every `TAKE_OVER_EVERY_S` seconds),
and forgets what it kept in memory of its own. A try that fails is told once, and made again.

Fails: a directory that cannot be used, or a file that vanishes or shrinks while it is mapped, leaves a cache in
memory, and `on_damage` is told.
"""

import hashlib
import mmap
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from engine import token_arena
from engine.token_arena import KEY_BYTES, Arena

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Found = tuple[npt.NDArray[np.int32], int]

Role = Literal["memory", "writer", "reader"]

# Tokenizers whose folders are kept: a model that is swapped for another and back finds its own again.
VERSIONS_MAX: Final = 4
# Entries that a reader takes over per refresh, beyond its first: at about 2 us each it delays no batch.
_FOLLOW_ENTRIES_MAX: Final = 4096
# How often a reader tries to become the writer, in seconds, while it is used at all.
TAKE_OVER_EVERY_S: Final = 1.0
_ARENA_BYTES_MIN: Final = 4096


class TokenCache:
    """A bounded map from content hash to token ids. Not thread-safe: one thread owns it.

    Args:
        bytes_max: of both arenas together; a reader uses as much memory again at most.
        entries_max: entries in the index of both arenas together; for a reader, of its own as well.
        version: identifies tokenizer and truncation, up to 32 bytes.
        width: bytes per id: 2 when the vocabulary has at most 65,536 entries, else 4.
        directory: where the arenas live; None keeps them in memory.
        on_damage: told when the directory or a file turns out to be unusable.
        clock: monotonic seconds.

    Attributes:
        role: `writer` or `reader` of the directory, or `memory`.
        damaged: entries that did not verify although nobody else writes.
    """

    def __init__(
        self,
        *,
        bytes_max: int,
        entries_max: int,
        version: bytes,
        width: int,
        directory: Path | None = None,
        on_damage: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert width in {2, 4}
        assert len(version) <= 32
        self._arena_bytes = max(bytes_max // 2, _ARENA_BYTES_MIN) // mmap.PAGESIZE * mmap.PAGESIZE
        self._entries_max = max(1, entries_max // 2)
        self._version = version.ljust(32, b"\0")
        self._width = width
        self._ids = _reader(width)
        self._directory = directory
        self._on_damage = on_damage
        self._clock = clock
        self._take_over_at_s = 0.0
        self._failing = False
        self._lock_file: int | None = None
        self._followed: list[_Followed] = []
        self.role: Role = "memory"
        self.damaged = 0
        self._arenas: list[Arena] = []
        self._indexes: list[dict[bytes, int]] = [{}, {}]
        if directory is None:
            self._own_memory()
        else:
            self._open(directory)

    def __len__(self) -> int:
        return sum(len(index) for index in self._indexes) + sum(len(each.index) for each in self._followed)

    def refresh(self) -> None:
        """Takes over what the writer appended since, or its place when it has ended; lets go of files that shrank.

        Called before each batch.
        """
        if self.role == "reader" and self._directory is not None and self._clock() >= self._take_over_at_s:
            self._open(self._directory)
        for followed in self._followed:
            followed.follow(_FOLLOW_ENTRIES_MAX)
        if self.role == "writer" and not all(arena.mapped.usable for arena in self._arenas):
            self._on_damage("token cache: its files were removed or truncated; it goes on in memory")
            self._own_memory()

    def get(self, key: bytes) -> "Found | None":
        """Ids (int32, a copy) and the number of tokens that truncation dropped, or None."""
        for i, index in enumerate(self._indexes):
            offset = index.get(key)
            if offset is None:
                continue
            found = self._arenas[i].get(key, offset)
            if found is not None:
                return self._ids(found[0]), found[1]
            self.damaged += 1
            del index[key]
        for followed in self._followed:
            found = followed.get(key)
            if found is not None:
                return self._ids(found[0]), found[1]
        return None

    def put(self, key: bytes, ids: "npt.NDArray[np.int32]", dropped: int) -> None:
        """Remembers `ids` (not empty); what is larger than an arena is not remembered."""
        assert len(key) == KEY_BYTES
        arena, index = self._arenas[self._active], self._indexes[self._active]
        body = ids.astype("<u2" if self._width == 2 else "<u4").tobytes()
        offset = arena.append(key, body, dropped) if len(index) < self._entries_max else None
        if offset is None:
            self._turn()
            arena, index = self._arenas[self._active], self._indexes[self._active]
            offset = arena.append(key, body, dropped)
        if offset is not None:
            index[key] = offset

    def close(self) -> None:
        """Releases files and memory. Idempotent."""
        for followed in self._followed:
            followed.close()
        for arena in self._arenas:
            arena.close()
        self._followed, self._arenas, self._indexes = [], [], []
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def _open(self, directory: Path) -> None:
        """Becomes the writer of its folder, or its reader while somebody else writes it."""
        folder = directory / f"tokens-{hashlib.blake2b(self._version, digest_size=8).hexdigest()}-{self._width}"
        files = [folder / f"{number}.arena" for number in (0, 1)]
        lock_file: int | None = None
        mapped: list[token_arena.Mapped] = []
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock_file = token_arena.lock(folder)
            if lock_file is None:
                self._follow(files)
                return
            for file in files:
                mapped.append(token_arena.for_writing(file, self._arena_bytes))  # noqa: PERF401 - closed on failure
        except OSError as error:
            for each in mapped:
                each.close()
            if lock_file is not None:
                os.close(lock_file)
            self._not_opened(folder, error)
            return
        self._failing = False
        self.close()
        self._lock_file = lock_file
        self.role = "writer"
        self._own(mapped)
        _forget_old(directory, folder)

    def _follow(self, files: list[Path]) -> None:
        """Reads what another one writes, until it is time to try again to become the writer."""
        self._take_over_at_s = self._clock() + TAKE_OVER_EVERY_S
        self._failing = False
        if self.role == "reader":
            return
        self._own_memory()
        self.role = "reader"
        self._followed = [_Followed(file, self._width, self._version, self._entries_max) for file in files]

    def _not_opened(self, folder: Path, error: OSError) -> None:
        """Goes on in memory; a reader goes on reading, since what failed may work later."""
        told = f"token cache: {folder} cannot be used ({error.strerror})"
        if self.role != "reader":
            self._own_memory()
            self._on_damage(f"{told}; it stays in memory")
            return
        self._take_over_at_s = self._clock() + TAKE_OVER_EVERY_S
        if not self._failing:
            self._failing = True
            self._on_damage(f"{told}; it goes on reading")

    def _own_memory(self) -> None:
        """Starts afresh in memory, without any file."""
        self.close()
        self.role = "memory"
        self._own([token_arena.in_memory(self._arena_bytes) for _ in range(2)])

    def _own(self, mapped: list[token_arena.Mapped]) -> None:
        """Takes over regions that this process alone writes, with what they hold."""
        self._arenas = [Arena(each, self._width, self._version) for each in mapped]
        self._indexes = [{}, {}]
        for arena, index in zip(self._arenas, self._indexes, strict=True):
            generation = arena.header()
            if generation is None:
                arena.clear(generation=0)
            else:
                arena.begin(generation)
                index.update(arena.scan(self._entries_max))
        self._active = 0 if self._arenas[0].generation >= self._arenas[1].generation else 1

    def _turn(self) -> None:
        generation = self._arenas[self._active].generation + 1
        self._active = 1 - self._active
        self._indexes[self._active].clear()
        self._arenas[self._active].clear(generation)


class _Followed:
    """A writer's arena, seen from another process."""

    def __init__(self, file: Path, width: int, version: bytes, entries_max: int) -> None:
        self._file = file
        self._width = width
        self._version = version
        self._entries_max = entries_max
        self._arena: Arena | None = None
        self.index: dict[bytes, int] = {}
        self.follow(entries_max)

    def follow(self, entries_max: int) -> None:
        """Takes over at most `entries_max` new entries; starts afresh when the arena was emptied or replaced."""
        if self._arena is None or not self._arena.mapped.usable:
            self._reopen()
        arena = self._arena
        if arena is None:
            return
        generation = arena.header()
        if generation is None:  # not begun yet, or being emptied at this moment
            self.index.clear()
            arena.begin(0)
            return
        if generation != arena.generation or arena.end == token_arena.HEADER_BYTES:
            self.index.clear()
            arena.begin(generation)
        room = min(entries_max, self._entries_max - len(self.index))
        self.index.update(arena.scan(max(0, room)))

    def get(self, key: bytes) -> tuple[bytes, int] | None:
        offset = self.index.get(key)
        if offset is None or self._arena is None:
            return None
        found = self._arena.get(key, offset)
        if found is None:  # emptied since the last refresh, or damaged
            del self.index[key]
        return found

    def close(self) -> None:
        if self._arena is not None:
            self._arena.close()
            self._arena = None
        self.index.clear()

    def _reopen(self) -> None:
        self.close()
        mapped = token_arena.for_reading(self._file)
        if mapped is not None:
            self._arena = Arena(mapped, self._width, self._version)


def _reader(width: int) -> "Callable[[bytes], npt.NDArray[np.int32]]":
    """From an entry's bytes to ids; looking up NumPy's names each time would take as long as the rest."""
    import numpy as np

    stored, wanted, read = np.dtype("<u2" if width == 2 else "<u4"), np.dtype(np.int32), np.frombuffer
    return lambda body: read(body, stored).astype(wanted)


def _forget_old(directory: Path, mine: Path) -> None:
    """Removes the folders of tokenizers that nobody used lately and nobody has locked."""
    for stray in directory.glob("tokens-?.arena"):  # the layout before folders
        with suppress(OSError):
            stray.unlink()
    with suppress(OSError):
        folders = sorted(
            (folder for folder in directory.glob("tokens-*-?") if folder != mine),
            key=lambda folder: (folder / token_arena.LOCK_NAME).stat().st_mtime_ns,
            reverse=True,
        )
        for folder in folders[VERSIONS_MAX - 1 :]:
            held = token_arena.lock(folder)
            if held is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(held)
