"""Reads a model folder's files, and names the one that cannot be read.

Fails: `Permanent`, with the file and the way out.
"""

import errno
import hashlib
import json
import stat
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Final

from sluice.errors import Permanent

AGAIN: Final = "copy or download the model again"
# Weights of up to this many bytes are hashed whole, in about a second; of larger ones, samples.
WHOLE_BYTES_MAX: Final = 1 << 30
_SAMPLE_BYTES: Final = 4096
# Of a safetensors header, as the library has it. What claims more is damaged, and is not read into memory.
_HEADER_BYTES_MAX: Final = 100_000_000


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    content = _parsed(file)
    if not isinstance(content, dict):
        raise Permanent(f"{file}: damaged: not a JSON object; {AGAIN}")
    return content


def optional_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when the file is not there."""
    return read_json(file) if file.exists() else {}


def optional_objects(file: Path) -> list[dict[str, Any]]:
    """The JSON list of objects in a file; empty when the file is not there."""
    content = _parsed(file) if file.exists() else []
    if not isinstance(content, list) or not all(isinstance(each, dict) for each in content):
        raise Permanent(f"{file}: damaged: not a JSON list of objects; {AGAIN}")
    return content


def regular(file: Path) -> Path:
    """The file, if it is one.

    Raises:
        OSError: it is not there, or a directory, or something that would never end.
    """
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode):
        why = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a directory"
        raise OSError(errno.EINVAL, why, str(file))
    return file


def unreadable(error: OSError, place: Path) -> Permanent:
    """What to tell when a file, or one in the folder `place`, cannot be read."""
    file = Path(error.filename or place)
    why = "a link to nothing" if file.is_symlink() and not file.exists() else error.strerror
    return Permanent(f"{file}: cannot be read: {why}; it must be a file that this user may read: {AGAIN}")


def weights_digest(files: Iterable[Path], whole_bytes_max: int = WHOLE_BYTES_MAX) -> bytes:
    """A hash of the weights' content, by which a model is told from any other.

    Files of up to `whole_bytes_max` bytes together are hashed whole. Larger ones would hold up every start and every
    SIGHUP for long: of them the safetensors header counts, and of every tensor its first, middle and last 4 KiB.
    Training changes every tensor that it touches nearly everywhere, so no trained model passes for another one; a few
    numbers that were changed inside a large tensor by hand may.

    Raises:
        OSError: a file cannot be read.
    """
    files = list(files)
    whole = sum(file.stat().st_size for file in files) <= whole_bytes_max
    digest = hashlib.blake2b(digest_size=32)
    for file in files:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as content:
            if whole:
                digest.update(hashlib.file_digest(content, hashlib.blake2b).digest())
            else:
                for part in _samples(content, size):
                    digest.update(part)
    return digest.digest()


def _samples(content: IO[bytes], size: int) -> Iterator[bytes]:
    """The header, and three pieces of each tensor. A damaged file ends early: opening it names the damage."""
    header_bytes = int.from_bytes(content.read(8), "little")
    header = content.read(min(header_bytes, size, _HEADER_BYTES_MAX))
    yield header
    for start, end in pairwise(_borders(header)):
        for place in (start, (start + end) // 2, max(start, end - _SAMPLE_BYTES)):
            content.seek(min(8 + header_bytes + place, size))
            yield content.read(min(_SAMPLE_BYTES, end - place))


def _borders(header: bytes) -> list[int]:
    """Where tensors begin and end, ascending; they lie one behind the other."""
    try:
        tensors = [tensor for name, tensor in json.loads(header).items() if name != "__metadata__"]
        return sorted({int(border) for tensor in tensors for border in tensor["data_offsets"] if border >= 0})
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError):
        return []


def _parsed(file: Path) -> Any:
    try:
        return json.loads(regular(file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Permanent(f"{file.parent} is not a model folder: it has no {file.name}") from error
    except OSError as error:
        raise unreadable(error, file) from error
    except (ValueError, RecursionError) as error:
        raise Permanent(f"{file}: damaged: {error}; {AGAIN}") from error
