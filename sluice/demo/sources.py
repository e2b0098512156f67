"""What the demo's agent reads: this host's metrics, its log files, and the sample stream on standard input."""

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sluice.errors import ConfigError

LOG_DIR: Final = Path("/var/log")
SAMPLE_STREAM: Final = "orders"
LOG_STREAM: Final = "logs"
LOG_FILES_MAX: Final = 16
_HEAD_BYTES: Final = 4096
# Binary by nature, or already rotated away.
_SKIPPED: Final = frozenset({".gz", ".xz", ".bz2", ".zst", ".zip", ".journal", ".old"})


def demo_sources(patterns: Sequence[str], backlog_bytes: int) -> list[Mapping[str, Any]]:
    """The `[[sources]]` of the agent.

    Args:
        patterns: files or globs to tail instead of the host's log files.
        backlog_bytes: of the log files together, read of what is in them already.

    Raises:
        ConfigError: naming a pattern that no readable file matches.
    """
    files = matching_files(patterns) if patterns else host_log_files()
    sources: list[Mapping[str, Any]] = [
        {"kind": "host", "stream": "host", "interval_s": 1.0, "sensitivity": "internal"},
        {"kind": "stdin", "stream": SAMPLE_STREAM, "format": "json", "sensitivity": "internal", "priority": 7},
    ]
    if files:
        tail = {"kind": "tail", "stream": LOG_STREAM, "paths": [glob.escape(str(path)) for path in files]}
        backlog = {"exclude": [], "backlog_bytes_max": max(1, backlog_bytes // len(files))}
        sources.append({**tail, **backlog, "sensitivity": "internal"})
    return sources


def matching_files(patterns: Sequence[str]) -> list[Path]:
    """The readable files that the patterns name.

    Raises:
        ConfigError: naming a pattern without one.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        paths = (Path(found) for found in glob.glob(os.path.expanduser(pattern), recursive=True))  # noqa: PTH111, PTH207
        found = sorted(path.absolute() for path in paths if _is_readable_file(path))
        if not found:
            raise ConfigError(f"--tail {pattern}: no file that can be read")
        files.update(dict.fromkeys(found))
    return list(files)


def host_log_files(folder: Path = LOG_DIR) -> list[Path]:
    """The host's log files that can be read and hold text, the most recently written first; maybe none."""
    found = [path for path in _walk(folder) if path.suffix not in _SKIPPED and _holds_text(path)]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)[:LOG_FILES_MAX]


def _walk(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def _is_readable_file(path: Path) -> bool:
    return path.is_file() and os.access(path, os.R_OK)


def _holds_text(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False
    return bool(head) and b"\0" not in head and path.is_file()
