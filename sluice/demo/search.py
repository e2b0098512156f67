"""Looks for tokens in bytes, however they are wrapped: the demo's proof that personal data did not leave the site.

It knows nothing of Sluice's formats on purpose, so that a mistake there cannot hide a leak from it. Every blob is
searched as it is, for each token as written, in hexadecimal and in base64 (both alphabets, all three alignments);
then compressed frames (zstd, gzip) wherever they begin in it are opened and searched in turn, and so are the columns of
a Parquet file.

Bounded: `depth_max` layers, `inflated_bytes_max` per frame, `frames_max` frames per blob; whatever exceeds a bound is
counted in `unopened`, and a search with unopened frames proves nothing.
"""

import base64
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final

import zstandard

if TYPE_CHECKING:
    import pyarrow as pa

ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
GZIP_MAGIC: Final = b"\x1f\x8b\x08"
PARQUET_MAGIC: Final = b"PAR1"
_WINDOW_BYTES_MAX: Final = 128 << 20
_GZIP_WBITS: Final = 31


@dataclass(slots=True)
class Found:
    """What a search saw.

    Attributes:
        places: where each token was met: the kinds of place (`kafka`, `lake`) and up to `PLACES_MAX` exact places.
        blobs: how many were searched.
        bytes: how many bytes were searched, layers included.
        unopened: compressed frames that were over a limit.
    """

    places: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    blobs: int = 0
    bytes: int = 0
    unopened: int = 0

    PLACES_MAX: ClassVar[int] = 3

    def note(self, token: str, kind: str, place: str) -> None:
        """Notes that a token was met."""
        places = self.places.setdefault(token, {}).setdefault(kind, [])
        if len(places) < self.PLACES_MAX and place not in places:
            places.append(place)

    def in_all(self, tokens: Iterable[str], kinds: Iterable[str]) -> set[str]:
        """Those of the tokens that were met in every one of these kinds of place."""
        wanted = set(kinds)
        return {token for token in tokens if wanted <= self.places.get(token, {}).keys()}


class TokenSearch:
    """Searches blobs for tokens.

    Args:
        needles: by token, the byte strings that betray it (as written, without separators, ...); each at least
            `NEEDLE_BYTES_MIN` long, or chance would find it.
        depth_max: layers of compression that are opened.
        inflated_bytes_max: of one frame.
        frames_max: compressed frames opened per blob.
    """

    NEEDLE_BYTES_MIN: ClassVar[int] = 8

    def __init__(
        self,
        needles: Mapping[str, Iterable[bytes]],
        *,
        depth_max: int = 3,
        inflated_bytes_max: int = 64 << 20,
        frames_max: int = 10_000,
    ) -> None:
        self.found = Found()
        self._depth_max = depth_max
        self._inflated_bytes_max = inflated_bytes_max
        self._frames_max = frames_max
        self._tokens: list[str] = []
        self._database: Any = None
        patterns: list[bytes] = []
        for token, forms in needles.items():
            for form in forms:
                assert len(form) >= self.NEEDLE_BYTES_MIN, f"a needle of {len(form)} bytes is found by chance"
                for pattern in dict.fromkeys(_disguises(form)):
                    patterns.append(pattern)
                    self._tokens.append(token)
        if patterns:
            self._database = _compile(patterns)

    def search(self, blob: bytes, kind: str, place: str) -> None:
        """Searches one blob in all its layers; what is met is noted in `found`.

        Args:
            blob: anything.
            kind: of place, such as `kafka`.
            place: exactly, such as `sluice.records/0@17`.
        """
        self.found.blobs += 1
        for layer in self._layers(blob):
            self.found.bytes += len(layer)
            self._scan(layer, kind, place)

    def _scan(self, data: Any, kind: str, place: str) -> None:
        if self._database is None or not len(data):
            return

        def hit(number: int, _start: int, _stop: int, _flags: int, _context: Any) -> None:
            self.found.note(self._tokens[number], kind, place)

        self._database.scan(data, match_event_handler=hit)

    def _layers(self, blob: bytes) -> Iterator[bytes]:
        yield blob
        if blob.startswith(PARQUET_MAGIC) and blob.endswith(PARQUET_MAGIC):
            yield from _parquet_values(blob)
            return
        level = [blob]
        opened = 0
        for _ in range(self._depth_max):
            below: list[bytes] = []
            for layer in level:
                for start in _frame_starts(layer):
                    opened += 1
                    if opened > self._frames_max:
                        self.found.unopened += 1
                        return
                    inner = self._inflate(memoryview(layer)[start:])
                    if inner:
                        below.append(inner)
            yield from below
            level = below

    def _inflate(self, frame: memoryview) -> bytes:
        limit = self._inflated_bytes_max
        try:
            if bytes(frame[:4]) == ZSTD_MAGIC:
                decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES_MAX)
                with decompressor.stream_reader(frame, read_across_frames=False) as reader:
                    inner = reader.read(limit + 1)
            else:
                inner = zlib.decompressobj(_GZIP_WBITS).decompress(frame, limit + 1)
        except (zstandard.ZstdError, zlib.error):
            return b""  # the magic number by chance
        if len(inner) > limit:
            self.found.unopened += 1
        return inner


def _compile(patterns: list[bytes]) -> Any:
    import hyperscan

    database = hyperscan.Database()
    # HEX and text are met in any case; base64 in another case is another text, but a chance hit there is as unlikely.
    flags = hyperscan.HS_FLAG_CASELESS | hyperscan.HS_FLAG_SINGLEMATCH
    database.compile(expressions=patterns, ids=list(range(len(patterns))), flags=flags, literal=True)
    return database


def _disguises(form: bytes) -> Iterator[bytes]:
    yield form
    yield form.hex().encode()
    for shift in range(3):
        # The characters that depend on the neighbours are left out on both sides.
        whole = base64.b64encode(b"\0" * shift + form)
        start = (8 * shift + 5) // 6
        stop = (8 * (shift + len(form))) // 6
        yield whole[start:stop]
        yield whole[start:stop].translate(bytes.maketrans(b"+/", b"-_"))


def _frame_starts(layer: bytes) -> Iterator[int]:
    for magic in (ZSTD_MAGIC, GZIP_MAGIC):
        at = layer.find(magic)
        while at >= 0:
            yield at
            at = layer.find(magic, at + 1)


def _parquet_values(file: bytes) -> Iterator[bytes]:
    """The values of all columns: the buffers of the decoded arrays, where strings lie one behind the other."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.ParquetFile(pa.BufferReader(file)).read()
    for column in table.columns:
        for chunk in column.chunks:
            yield from _array_buffers(chunk)


def _array_buffers(array: "pa.Array") -> Iterator[bytes]:
    import pyarrow as pa

    if isinstance(array, pa.DictionaryArray):
        yield from _array_buffers(array.dictionary)
    for buffer in array.buffers():
        if buffer is not None and buffer.size:
            yield buffer.to_pybytes()
