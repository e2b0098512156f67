r"""How far a text is from what its stream usually says. Pure, bounded.

Per stream a fixed number of centroids stands for the kinds of text that were seen: a text nearer than
`merge_similarity` to one moves it a little towards itself, another text opens a new one, in the place of
the kind that is least in use when all are taken. Novelty is 1 - the highest cosine to a centroid *before*
the text itself is learnt, in [0, 1]: 0 is said all the time, values above about 0.5 have no relative in the
stream. A new stream knows nothing yet, so its novelty is scaled up from 0 over its first texts instead of
alarming on each of them.

State: streams_max * centroids_max vectors; the stream that was quiet longest is forgotten first. `pack` and `unpack`
carry it over a restart exactly: magic "SLNOV1\0\0" | crc32 of the rest u32 little-endian | MessagePack of `_Packed`.
"""

import zlib
from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec

from engine.config import NoveltyConfig

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# A centroid's use halves over this many texts of its stream: a kind that went away makes room.
HALF_LIFE_TEXTS: Final = 5000
# A centroid follows its kind at least this fast, so that slow drift is not novel.
LEARNING_MIN: Final = 0.02
# Uses are stored multiplied by a growing factor; rescaled before it overflows.
_SCALE_MAX: Final = 1e30
_MAGIC: Final = b"SLNOV1\0\0"
_HEAD_BYTES: Final = len(_MAGIC) + 4
# In a packed state: names that are longer are left out, and what else a stream takes beside its vectors.
_NAME_BYTES_MAX: Final = 512
_STREAM_BYTES: Final = 512


class _PackedStream(msgspec.Struct, array_like=True):
    name: bytes
    seen: int
    scale: float
    uses: bytes  # float64, little-endian
    centroids: bytes  # float32, little-endian


class _Packed(msgspec.Struct):
    space: str
    settings: NoveltyConfig
    width: int
    streams: list[_PackedStream]


class Novelty:
    """Novelty of all streams.

    Args:
        config: the bounds.
        width: of the vectors.
        space: names what the vectors are comparable with (`Loaded.output_version`).

    Attributes:
        texts: read so far: whether there is anything new to keep.
    """

    def __init__(self, config: NoveltyConfig, width: int, space: str = "") -> None:
        self._config = config
        self._width = width
        self._space = space
        self._streams: OrderedDict[str, _Stream] = OrderedDict()
        self.texts = 0

    def __len__(self) -> int:
        return len(self._streams)

    def fits(self, config: NoveltyConfig, width: int, space: str) -> bool:
        """Whether a Novelty made with these would mean the same."""
        return (config, width, space) == (self._config, self._width, self._space)

    @property
    def packed_bytes_max(self) -> int:
        """What `pack` gives at most."""
        stream = _NAME_BYTES_MAX + _STREAM_BYTES + self._config.centroids_max * (4 * self._width + 8)
        return (self._config.streams_max + 1) * stream

    def read(self, stream: str, rows: "Sequence[npt.NDArray[np.floating[Any]]]") -> list[float]:
        """Scores texts in their order and learns them.

        Args:
            stream: whose texts they are.
            rows: normalised vectors (what lies behind the embedding in a row is ignored). One that is not finite
                scores 0 and is not learnt: it would blind the stream.
        """
        import numpy as np

        if not rows:
            return []
        self.texts += len(rows)
        known = self._streams.get(stream)
        if known is None:
            known = self._streams[stream] = _Stream(self._config, self._width)
        self._streams.move_to_end(stream)
        if len(self._streams) > self._config.streams_max:
            self._streams.popitem(last=False)
        vectors = np.stack(rows)[:, : self._width].astype(np.float32)
        return [known.score(vector) if np.isfinite(vector).all() else 0.0 for vector in vectors]

    def forget(self, streams: Iterable[str]) -> bool:
        """Makes these streams new. Whether any of them was known."""
        known = [name for name in streams if name in self._streams]
        for name in known:
            del self._streams[name]
        return bool(known)

    def pack(self, skip: Container[str] = ()) -> bytes:
        """What is known, but for the streams that are skipped."""
        known = {name: each for name, each in self._streams.items() if name not in skip}
        names = {name.encode("utf-8", "surrogatepass"): each for name, each in known.items()}
        streams = [each.pack(name) for name, each in names.items() if len(name) <= _NAME_BYTES_MAX]
        packed = _Packed(self._space, self._config, self._width, [each for each in streams if each.uses])
        body = msgspec.msgpack.encode(packed)
        return _MAGIC + zlib.crc32(body).to_bytes(4, "little") + body

    def unpack(self, data: bytes) -> None:
        """Knows what `pack` wrote, and nothing else.

        Raises:
            ValueError: it is damaged, or of another space or other settings; nothing was changed.
        """
        body = memoryview(data)[_HEAD_BYTES:]
        if data[:_HEAD_BYTES] != _MAGIC + zlib.crc32(body).to_bytes(4, "little"):
            raise ValueError("damaged, or no memory of streams")
        try:
            packed = msgspec.msgpack.decode(body, type=_Packed)
        except msgspec.MsgspecError as error:
            raise ValueError(f"of another version: {error}") from error
        if not self.fits(packed.settings, packed.width, packed.space):
            raise ValueError("of another model or other settings of novelty")
        self._streams = OrderedDict(
            (each.name.decode("utf-8", "surrogatepass"), _Stream.unpacked(self._config, self._width, each))
            for each in packed.streams
        )


class _Stream:
    def __init__(self, config: NoveltyConfig, width: int) -> None:
        import numpy as np

        self._config = config
        self._seen = 0
        self._count = 0
        self._scale = 1.0
        # Grows by doubling: most streams say few kinds of things.
        self._centroids = np.zeros((min(8, config.centroids_max), width), np.float32)
        self._uses = np.zeros(len(self._centroids))

    @classmethod
    def unpacked(cls, config: NoveltyConfig, width: int, packed: _PackedStream) -> Self:
        """What `pack` gave, again."""
        import numpy as np

        stream = cls(config, width)
        stream._seen, stream._scale = packed.seen, packed.scale
        stream._uses = np.frombuffer(packed.uses, "<f8").copy()
        stream._centroids = np.frombuffer(packed.centroids, "<f4").reshape(-1, width).copy()
        stream._count = len(stream._uses)
        return stream

    def pack(self, name: bytes) -> _PackedStream:
        """As bytes; without uses when it knows nothing yet."""
        uses = self._uses[: self._count].astype("<f8").tobytes()
        centroids = self._centroids[: self._count].astype("<f4").tobytes()
        return _PackedStream(name, self._seen, self._scale, uses, centroids)

    def score(self, vector: "npt.NDArray[np.float32]") -> float:
        """Novelty of one text, which is learnt afterwards."""
        trust = min(1.0, self._seen / self._config.warmup_texts)
        self._seen += 1
        self._age()
        if not self._count:
            self._open(vector)
            return 0.0
        similarity = self._centroids[: self._count] @ vector
        nearest = int(similarity.argmax())
        best = float(similarity[nearest])
        if best >= self._config.merge_similarity:
            self._learn(nearest, vector)
        else:
            self._open(vector)
        return trust * min(1.0, max(0.0, 1.0 - best))

    def _age(self) -> None:
        # Instead of shrinking all uses at every text, new uses count more and more.
        self._scale *= 2 ** (1 / HALF_LIFE_TEXTS)
        if self._scale > _SCALE_MAX:
            self._uses /= self._scale
            self._scale = 1.0

    def _learn(self, index: int, vector: "npt.NDArray[np.float32]") -> None:
        import numpy as np

        self._uses[index] += self._scale
        rate = max(LEARNING_MIN, float(self._scale / self._uses[index]))
        moved = self._centroids[index] * (1 - rate) + vector * rate
        self._centroids[index] = moved / max(float(np.linalg.norm(moved)), 1e-6)

    def _open(self, vector: "npt.NDArray[np.float32]") -> None:
        if self._count == len(self._centroids) < self._config.centroids_max:
            self._grow()
        if self._count < len(self._centroids):
            index = self._count
            self._count += 1
        else:
            index = int(self._uses.argmin())
        self._centroids[index] = vector
        self._uses[index] = self._scale

    def _grow(self) -> None:
        import numpy as np

        more = min(self._config.centroids_max, 2 * self._count) - self._count
        self._centroids = np.pad(self._centroids, ((0, more), (0, 0)))
        self._uses = np.pad(self._uses, (0, more))
