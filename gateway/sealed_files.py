"""The files of a sealed table: names, which of them count, and which to merge or delete. Pure.

A name says everything that these decisions need:

    {first}-{last}-{oldest_ms}-{newest_ms}-{rows}.parquet

`first` and `last` are commit numbers, both inclusive. A merged file covers a range of commits; a file whose range lies
within another's is a leftover of a merge that was cut short: it does not count, and goes at the next opening. So a
crash between any two steps of a merge neither loses nor doubles a row.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

SUFFIX: Final = ".parquet"
TEMPORARY: Final = ".tmp"
_NAME: Final = re.compile(r"(\d{14})-(\d{14})-(\d{13,})-(\d{13,})-(\d+)\.parquet\Z")
# Files are of one tier when their sizes differ by less than this factor: each row is then rewritten a few times only.
_TIER_FACTOR: Final = 8
_TIER_BYTES_FIRST: Final = 64 * 1024


@dataclass(frozen=True, slots=True, order=True)
class SealedFile:
    """One file, as its name (and the directory) tells.

    Attributes:
        first, last: commit numbers.
        oldest_ms, newest_ms: when the first and the last of these commits happened; Unix time.
        rows: how many.
        size_bytes: on disk.
    """

    first: int
    last: int
    oldest_ms: int
    newest_ms: int
    rows: int
    size_bytes: int = 0

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.first:014d}-{self.last:014d}-{self.oldest_ms:013d}-{self.newest_ms:013d}-{self.rows}{SUFFIX}"

    @classmethod
    def parse(cls, name: str, size_bytes: int = 0) -> "SealedFile | None":
        """From its name; None when it is no sealed file."""
        match = _NAME.match(name)
        if match is None:
            return None
        first, last, oldest_ms, newest_ms, rows = map(int, match.groups())
        return cls(first, last, oldest_ms, newest_ms, rows, size_bytes)

    def covers(self, other: "SealedFile") -> bool:
        """Whether `other` is a leftover of the merge that made this file."""
        return self != other and self.first <= other.first and other.last <= self.last


def visible(files: Iterable[SealedFile]) -> tuple[list[SealedFile], list[SealedFile]]:
    """The files that count, by commit, and the leftovers."""
    kept: list[SealedFile] = []
    leftovers: list[SealedFile] = []
    for file in sorted(files, key=lambda f: (f.first, -f.last)):
        (leftovers if kept and kept[-1].covers(file) else kept).append(file)
    return kept, leftovers


def merged(files: Sequence[SealedFile], rows: int) -> SealedFile:
    """What the merge of neighbouring files is called."""
    return SealedFile(files[0].first, files[-1].last, files[0].oldest_ms, files[-1].newest_ms, rows)


def plan_merge(
    files: Sequence[SealedFile], *, merge_files: int, rotate_bytes: int, rotate_ms: int
) -> Sequence[SealedFile]:
    """The next files to merge, or none.

    Size-tiered, as in log-structured stores: neighbours are merged when `merge_files` of them are of one tier (smaller
    ones between them go along), so that a row is rewritten once a tier.

    Args:
        files: those that count, by commit.
        merge_files: how many of a tier at least.
        rotate_bytes: limit of the result; files at or above it are finished.
        rotate_ms: time that the result may span.
    """
    low, high = 0, _TIER_BYTES_FIRST
    while low < rotate_bytes:
        for run in _runs(files, min(high, rotate_bytes), rotate_bytes, rotate_ms):
            if sum(file.size_bytes >= low for file in run) >= merge_files:
                return run
        low, high = high, high * _TIER_FACTOR
    return ()


def _runs(
    files: Sequence[SealedFile], size_bytes_max: int, total_bytes_max: int, span_ms_max: int
) -> Iterator[list[SealedFile]]:
    """Runs of neighbours below a size, each as long as total and time span allow, in order."""
    run: list[SealedFile] = []
    total = 0
    for file in files:
        small = file.size_bytes < size_bytes_max
        fits = total + file.size_bytes <= total_bytes_max
        near = not run or file.newest_ms - run[0].oldest_ms <= span_ms_max
        if run and not (small and fits and near):
            yield run
            run, total = [], 0
        if small:
            run.append(file)
            total += file.size_bytes
    if run:
        yield run


def expired(files: Iterable[SealedFile], before_ms: int) -> list[SealedFile]:
    """Files all of whose rows are older than a time."""
    return [file for file in files if file.newest_ms < before_ms]
