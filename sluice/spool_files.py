"""The spool's directory: who owns it, its ballast, and the steps of replacing a damaged database.

    DIRECTORY/            mode 0700
      lock                held (flock) by the one writer; holds its process id
      ballast             space that is given back when the disk is full, so that draining, which needs some, works
      db/                 diskcache's directory
      db.new/             a database being made or recovered; never read, thrown away after a crash
      db.damaged/         the database that a recovery is replacing; it is the truth until `db` exists again

Every rename is followed by an fsync of the directory, so each crash leaves exactly one of these states.
"""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from typing import Final

from sluice.errors import ConfigError

LOCK_NAME: Final = "lock"
BALLAST_NAME: Final = "ballast"
_BLOCK: Final = b"\0" * 65536


class SpoolDirectory:
    """The directory of one spool.

    Args:
        path: made when it does not exist.
        ballast_bytes: size of the ballast; 0 for none.
    """

    def __init__(self, path: Path, ballast_bytes: int) -> None:
        self.path = path
        self.database = path / "db"
        self.new = path / "db.new"
        self.damaged = path / "db.damaged"
        self._ballast = path / BALLAST_NAME
        self._ballast_bytes = ballast_bytes
        self._lock_file: int | None = None

    def claim(self) -> None:
        """Makes the directory and becomes its one writer.

        Raises:
            ConfigError: another process has it (named), or it cannot be used.
        """
        try:
            existed = self.path.is_dir()
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.chmod(0o700)
            if not existed:
                sync_directory(self.path.parent)
            handle = os.open(self.path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"spool.directory: cannot use {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise ConfigError(
                f"spool.directory: {self.path} is in use by process {owner}; a spool has one writer: "
                "stop that process or set another spool.directory"
            ) from error
        self._lock_file = handle
        # A full disk must not keep the spool from being drained, so the process id is written if it can be.
        with contextlib.suppress(OSError):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)

    @property
    def claimed(self) -> bool:
        """Whether we are the writer."""
        return self._lock_file is not None

    def release(self) -> None:
        """Lets another process have it."""
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def make_ballast(self) -> bool:
        """Makes the ballast when it is missing and there is ample room; returns whether it is there."""
        if self._ballast_bytes == 0 or self.has_ballast:
            return True
        # Ample: half of what is free stays free, or the ballast would itself fill the disk.
        if self.free_bytes() < 2 * self._ballast_bytes:
            return False
        try:
            with self._ballast.open("wb") as file:
                # Written, not only allocated: some file systems promise what they do not have.
                for _ in range(-(-self._ballast_bytes // len(_BLOCK))):
                    file.write(_BLOCK)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            self._ballast.unlink(missing_ok=True)
            return False
        return True

    @property
    def has_ballast(self) -> bool:
        """Whether the ballast is there, whole."""
        try:
            return self._ballast.stat().st_size >= self._ballast_bytes
        except FileNotFoundError:
            return False

    def release_ballast(self) -> bool:
        """Gives its space back; returns whether there was any."""
        if not self._ballast.exists():
            return False
        self._ballast.unlink()
        return True

    def free_bytes(self) -> int:
        """What the file system has left for us."""
        stat = os.statvfs(self.path)
        return stat.f_bavail * stat.f_frsize

    def interrupted_recovery(self) -> bool:
        """Clears what a crash left behind; returns whether a recovery must be done again from `db.damaged`."""
        shutil.rmtree(self.new, ignore_errors=True)
        if not self.damaged.exists():
            return False
        if self.database.exists():
            shutil.rmtree(self.damaged)
            return False
        return True

    def set_damaged_aside(self) -> None:
        """`db` becomes `db.damaged`."""
        if not self.damaged.exists():
            self.database.rename(self.damaged)
            sync_directory(self.path)

    def start_new(self) -> Path:
        """An empty `db.new`."""
        shutil.rmtree(self.new, ignore_errors=True)
        self.new.mkdir(mode=0o700)
        return self.new

    def put_new_in_place(self) -> None:
        """`db.new` becomes `db`, durably; `db.damaged` goes."""
        for file in self.new.iterdir():
            sync_file(file)
        sync_directory(self.new)
        self.new.rename(self.database)
        sync_directory(self.path)
        shutil.rmtree(self.damaged, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Makes the directory's entries durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Makes the file's content durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
