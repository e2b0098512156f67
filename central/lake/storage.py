"""Where the lake's bytes are: a directory or an S3-compatible store, behind one small seam.

Invariant: a file appears in a table's directory whole or not at all. It is written to a staging folder outside every
table first (globs of other tools break on a partial file anywhere in a tree), then renamed into place (directory) or
uploaded with one PUT (object store).

Fails with `Retryable` for whatever disk or network do, `ConfigError` for a place that cannot be used at all.
"""

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from central.lake.config import LakeConfig
from sluice.errors import ConfigError, Retryable

STAGED_SUFFIX = ".partial"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file in a table's directory: its path relative to the table, bytes, and modification time (Unix seconds)."""

    path: str
    size_bytes: int
    modified_s: float


class LakeStorage:
    """Paths and files of one lake. Safe for use by several threads."""

    def __init__(self, config: LakeConfig) -> None:
        scheme = urlsplit(config.uri).scheme
        self.is_local = scheme in ("", "file")
        self.options = dict(config.storage_options)
        self._fsync = config.fsync
        if self.is_local:
            self._root = Path(urlsplit(config.uri).path if scheme else config.uri).absolute()
            self.uri = str(self._root)
            self._staging = Path(config.staging_dir) if config.staging_dir else self._root / ".staging"
        else:
            self.uri = config.uri.rstrip("/")
            self._staging = Path(config.staging_dir or tempfile.gettempdir()) / "sluice-staging"

    def prepare(self) -> None:
        """Makes the folders.

        Raises:
            ConfigError: naming the folder that cannot be made or written.
        """
        folders = [self._staging, self._root] if self.is_local else [self._staging]
        for folder in folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"lake: cannot make {folder}: {error.strerror}; check lake.uri") from error
            if not os.access(folder, os.W_OK):
                raise ConfigError(f"lake: cannot write to {folder}; check its owner, or lake.uri")

    def table_uri(self, table: str) -> str:
        """The address of a table, as deltalake takes it."""
        return f"{self.uri}/{table}"

    def stage(self) -> Path:
        """A new path to write a file to; nobody else uses it.

        Raises:
            Retryable: the staging folder is gone and cannot be made again.
        """
        try:
            self._staging.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Retryable(f"lake: cannot make {self._staging}: {error}") from error
        return self._staging / f"{uuid.uuid4().hex}{STAGED_SUFFIX}"

    def publish(self, staged: Path, table: str, path: str) -> None:
        """Moves a finished file into a table's directory, whole.

        Raises:
            Retryable: the disk or the store failed; the staged file may be gone, the published one does not exist.
        """
        try:
            if self.is_local:
                self._rename(staged, self._root / table / path)
            else:
                self._upload(staged, f"{self._remote_root()}/{table}/{path}")
                staged.unlink()
        except OSError as error:
            if error.errno == errno.EXDEV:
                detail = f"{self._staging} is on another file system than {self.uri}"
                raise ConfigError(f"lake: {detail}; set lake.staging_dir") from error
            raise Retryable(f"lake: cannot publish {table}/{path}: {error}") from error

    def discard_staged(self, staged: Path) -> None:
        """Removes a staged file, if it is there. What cannot be removed is left to `vacuum`."""
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)

    def remove(self, table: str, path: str) -> None:
        """Removes a file of a table that no commit names. A file that is gone already is fine."""
        try:
            if self.is_local:
                (self._root / table / path).unlink(missing_ok=True)
            else:
                self._filesystem().delete_file(f"{self._remote_root()}/{table}/{path}")
        except FileNotFoundError:
            return
        except OSError as error:
            raise Retryable(f"lake: cannot remove {table}/{path}: {error}") from error

    def files(self, table: str) -> Iterator[StoredFile]:
        """The Parquet files in a table's directory, committed or not; the Delta log is not among them."""
        import pyarrow.fs

        filesystem, root = self.arrow_filesystem()
        base = f"{root}/{table}"
        selector = pyarrow.fs.FileSelector(base, recursive=True, allow_not_found=True)
        for info in filesystem.get_file_info(selector):
            path = info.path[len(base) + 1 :]
            if info.is_file and path.endswith(".parquet") and not path.startswith("_delta_log"):
                yield StoredFile(path, info.size, info.mtime.timestamp())

    def arrow_filesystem(self) -> tuple[Any, str]:
        """The file system for pyarrow, and the lake's path in it."""
        import pyarrow.fs

        if self.is_local:
            return pyarrow.fs.LocalFileSystem(), str(self._root)
        return self._filesystem(), self._remote_root()

    def stale_staged(self, older_than_s: float) -> list[Path]:
        """Files left in the staging folder by a process that died, last written before Unix time `older_than_s`."""
        if not self._staging.is_dir():
            return []
        found = self._staging.glob(f"*{STAGED_SUFFIX}")
        return sorted(path for path in found if path.stat().st_mtime < older_than_s)

    def sync_commit(self, table: str, version: int) -> None:
        """Forces a local commit to disk: deltalake leaves that to the kernel. Nothing to do on an object store."""
        if not (self.is_local and self._fsync):
            return
        log = self._root / table / "_delta_log"
        entry = log / f"{version:020d}.json"
        try:
            _sync(entry)
            _sync(log)
        except FileNotFoundError:
            return  # a checkpoint has replaced it already
        except OSError as error:
            raise Retryable(f"lake: cannot sync {entry}: {error}") from error

    def free_bytes(self) -> int | None:
        """Room left for a local lake; None for an object store."""
        return shutil.disk_usage(self._root).free if self.is_local else None

    def _rename(self, staged: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if self._fsync:
            _sync(staged)
        staged.replace(target)
        if self._fsync:
            _sync(target.parent)

    def _upload(self, staged: Path, target: str) -> None:
        filesystem = self._filesystem()
        try:
            with staged.open("rb") as source, filesystem.open_output_stream(target) as sink:
                shutil.copyfileobj(source, sink, 8 << 20)
        except OSError:
            # Leaving the stream on an error completes the upload of what was sent.
            with contextlib.suppress(OSError):
                filesystem.delete_file(target)
            raise

    def _remote_root(self) -> str:
        parts = urlsplit(self.uri)
        return f"{parts.netloc}{parts.path}"

    def _filesystem(self) -> Any:
        """The store through pyarrow, with the same settings that deltalake gets."""
        import pyarrow.fs

        if urlsplit(self.uri).scheme not in ("s3", "s3a"):
            filesystem, _ = pyarrow.fs.FileSystem.from_uri(self.uri)
            return filesystem
        option = self._option
        endpoint = option("AWS_ENDPOINT_URL")
        return pyarrow.fs.S3FileSystem(
            access_key=option("AWS_ACCESS_KEY_ID"),
            secret_key=option("AWS_SECRET_ACCESS_KEY"),
            session_token=option("AWS_SESSION_TOKEN"),
            region=option("AWS_REGION") or option("AWS_DEFAULT_REGION"),
            # A file below 5 MB is one request and not three, whose last one may fail with a 200.
            allow_delayed_open=True,
            endpoint_override=endpoint,
            scheme="http" if endpoint and endpoint.startswith("http:") else "https",
        )

    def _option(self, name: str) -> str | None:
        known = {key.upper(): value for key, value in self.options.items()}
        return known.get(name) or os.environ.get(name)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
