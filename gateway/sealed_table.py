"""One encrypted table: a directory of Parquet files, each written whole or not at all.

Writing: a temporary name, fsync, rename, fsync of the directory. Only then does a commit count. Merging reads
neighbours, writes one file that covers their commits, then deletes them (`sealed_files` says why no crash doubles a
row).

Not thread-safe for two commits or two merges at a time; one commit beside one merge is fine. Readers need no lock.

How it fails: `Backpressure` when the disk is full, `Retryable` for other trouble of the disk, `ConfigError` for a wrong
key, `Permanent` for a file that is damaged (named).
"""

import errno
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gateway.sealed_files import SUFFIX, TEMPORARY, SealedFile, merged, visible
from gateway.sealed_key import FOOTER, SealedKey
from gateway.sealed_schema import Columns
from sluice.errors import Backpressure, Permanent, Retryable, SluiceError

if TYPE_CHECKING:
    import pyarrow as pa

# A file that a merge deleted is looked up again under the merge's name; two merges in a row are rare, three a bug.
_READ_ATTEMPTS: Final = 5


class SealedTable:
    """The files of one table.

    Args:
        directory: of this table alone; made with mode 0700.
        columns: its schema and which column has which key.
        key: of the store.
        retry_after_s: asked for when the disk is full.
    """

    def __init__(self, directory: Path, columns: Columns, key: SealedKey, retry_after_s: float) -> None:
        self.directory = directory
        self.columns = columns
        self._retry_after_s = retry_after_s
        self._factory, self._connection = key.factory()

    def open_for_writing(self) -> list[SealedFile]:
        """Makes the directory, removes what a crash left, and returns the files."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self.directory.glob(f"*{TEMPORARY}"):
            path.unlink()
        files, leftovers = visible(self._list())
        self.delete(leftovers)
        return files

    def files(self) -> list[SealedFile]:
        """The files that count, by commit."""
        return visible(self._list())[0]

    def commit(self, table: "pa.Table", number: int, now_ms: int) -> SealedFile:
        """Makes rows durable as commit `number`."""
        return self._write(table, SealedFile(number, number, now_ms, now_ms, table.num_rows))

    def merge(self, files: Sequence[SealedFile]) -> SealedFile:
        """Replaces neighbouring files by one."""
        import pyarrow as pa

        table = pa.concat_tables([self.read(file) for file in files])
        made = self._write(table, merged(files, table.num_rows))
        self.delete(files)
        return made

    def delete(self, files: Sequence[SealedFile]) -> None:
        """Removes files; those that are gone already are fine."""
        for file in files:
            (self.directory / file.name).unlink(missing_ok=True)
        if files:
            _sync_directory(self.directory)

    def read(self, file: SealedFile, columns: Sequence[str] | None = None) -> "pa.Table":
        """The rows of a file.

        Raises:
            FileNotFoundError: it was merged or has expired meanwhile.
            ConfigError: sealed with another key.
            Permanent: damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq
        from pyarrow.parquet.encryption import DecryptionConfiguration

        path = self.directory / file.name
        try:
            properties = self._factory.file_decryption_properties(self._connection, DecryptionConfiguration())
            with pq.ParquetFile(path, decryption_properties=properties) as parquet:
                return parquet.read(columns=list(columns) if columns else None)
        except (FileNotFoundError, SluiceError):
            raise
        except (pa.ArrowException, OSError) as error:
            raise Permanent(f"sealed file {path} cannot be read: {_first_line(error)}") from error

    def readable(self, file: SealedFile) -> bool:
        """Whether a file is whole; one that is gone is."""
        try:
            self.read(file)
        except FileNotFoundError:
            return True
        except Permanent:
            return False
        return True

    def scan(
        self, after: int = -1, columns: Sequence[str] | None = None, since_ms: int = 0
    ) -> Iterator[tuple[SealedFile, "pa.Table"]]:
        """Files with commits after a number, in order; a table may hold rows of earlier commits (`commit` tells).

        Goes on beside a writer: a file that is merged meanwhile is read under its new name.
        """
        missing = 0
        while True:
            file = next((f for f in self.files() if f.last > after and f.newest_ms >= since_ms), None)
            if file is None:
                return
            try:
                table = self.read(file, columns)
            except FileNotFoundError:
                missing += 1
                if missing >= _READ_ATTEMPTS:
                    raise Retryable(f"sealed files in {self.directory} change faster than they can be read") from None
                continue
            missing, after = 0, file.last
            yield file, table

    def _list(self) -> Iterator[SealedFile]:
        if not self.directory.is_dir():
            return
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if not entry.name.endswith(SUFFIX) or SealedFile.parse(entry.name) is None:
                    continue
                try:
                    size = entry.stat().st_size
                except FileNotFoundError:
                    continue
                file = SealedFile.parse(entry.name, size)
                assert file is not None, "parsed above"
                yield file

    def _write(self, table: "pa.Table", file: SealedFile) -> SealedFile:
        final = self.directory / file.name
        temporary = final.with_suffix(TEMPORARY)
        try:
            size = self._write_file(table, temporary)
            temporary.rename(final)
            _sync_directory(self.directory)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._translate(error) from error
        return replace(file, size_bytes=size)

    def _write_file(self, table: "pa.Table", path: Path) -> int:
        import pyarrow.parquet as pq
        from pyarrow.parquet.encryption import EncryptionConfiguration

        keys = {master: list(leaves) for master, leaves in self.columns.leaves_by_key.items()}
        configuration = EncryptionConfiguration(footer_key=FOOTER, column_keys=keys, data_key_length_bits=256)
        properties: Any = self._factory.file_encryption_properties(self._connection, configuration)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            pq.write_table(table, file, compression="zstd", encryption_properties=properties)
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def _translate(self, error: OSError) -> SluiceError:
        message = f"sealed store {self.directory}: {error.strerror or error}"
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            return Backpressure(message, retry_after_s=self._retry_after_s)
        return Retryable(message)


def write_durably(path: Path, text: str) -> None:
    """Replaces a small file so that after a crash it is the old or the new one."""
    temporary = path.with_suffix(".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_directory(path.parent)


def saved_position(path: Path) -> int:
    """The commit number that a follower saved; -1 when there is none or it cannot be read."""
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["position"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
