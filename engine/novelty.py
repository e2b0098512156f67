"""How far a text is from what its stream usually says. Pure, bounded.

Per stream a fixed number of centroids stands for the kinds of text that were seen: a text nearer than
`merge_similarity` to one moves it a little towards itself, another text opens a new one, in the place of
the kind that is least in use when all are taken. Novelty is 1 - the highest cosine to a centroid *before*
the text itself is learnt, in [0, 1]: 0 is said all the time, values above about 0.5 have no relative in the
stream. A new stream knows nothing yet, so its novelty is scaled up from 0 over its first texts instead of
alarming on each of them.

State: streams_max * centroids_max vectors; the stream that was quiet longest is forgotten first.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

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


class Novelty:
    """Novelty of all streams.

    Args:
        config: the bounds.
        width: of the vectors.
    """

    def __init__(self, config: NoveltyConfig, width: int) -> None:
        self._config = config
        self._width = width
        self._streams: OrderedDict[str, _Stream] = OrderedDict()

    def __len__(self) -> int:
        return len(self._streams)

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
        known = self._streams.get(stream)
        if known is None:
            known = self._streams[stream] = _Stream(self._config, self._width)
        self._streams.move_to_end(stream)
        if len(self._streams) > self._config.streams_max:
            self._streams.popitem(last=False)
        vectors = np.stack(rows)[:, : self._width].astype(np.float32)
        return [known.score(vector) if np.isfinite(vector).all() else 0.0 for vector in vectors]


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
