"""What is read from a model's output: the registry of tasks.

A task turns output rows into verdicts. Which tasks a model offers follows from its kind:

* `embed`: the vector itself, no label.
* `classify`: the model's own sequence-classification head, read as transformers' pipeline does, or, for an
  embedding model, zero-shot: cosine to the descriptions of each label, the best of them counts, softmax over
  labels. The softmax' temperature is calibrated on the descriptions themselves: each is held out once and
  sorted by the others, and the temperature with the least log loss is taken, so that a score is about as high
  as the labels are distinguishable for this model.
* `novelty`: the distance to what the stream usually says (computed by `novelty` for every task), as the
  score.
* `tokens`: spans of the text (names, places, ...) from a token-classification head, merged as transformers'
  pipeline does (see `spans`). Its label and score are those of the span with the highest score; both are empty
  when there is none. The only task that looks at the texts again: for those with a span, to find the span's
  characters.

A new task is a class with `read`, added to `build`; rows are arrays of any shape. Text generation is none of
them: it streams, and has a door of its own (see `generation`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from engine.backend import BackendInfo
from engine.spans import OUTSIDE, Aggregation, Alignment, Span, merge, softmax
from sluice.errors import Permanent

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Row = npt.NDArray[np.floating[Any]]
    Vectors = npt.NDArray[np.float32]

# When descriptions are too few to calibrate on: what the default labels give with MiniLM.
TEMPERATURE_DEFAULT: Final = 0.08
TEMPERATURES: Final = (0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.13, 0.17, 0.22, 0.3, 0.4)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a task says about one text.

    Attributes:
        label: empty when the task gives none.
        score: in [0, 1], but for a head made for regression: the number that it gives.
        spans: those of the task `tokens`.
    """

    label: str = ""
    score: float = 0.0
    spans: tuple[Span, ...] = ()


class Task(Protocol):
    """Reads verdicts from output rows."""

    def read(self, rows: "Sequence[Row]", texts: Sequence[str]) -> list[Verdict]:
        """One verdict per row; `texts` are what the rows were computed from."""
        ...


class NoVerdict:
    """For tasks whose result is the embedding or the novelty."""

    def read(self, rows: "Sequence[Row]", texts: Sequence[str] = ()) -> list[Verdict]:
        """See `Task`."""
        return [Verdict() for _ in rows]


class HeadClassifier:
    """The label with the highest logit of the model's head, and its probability.

    A softmax over the labels, where one of them holds; a sigmoid of its own logit, where each may hold or not, or
    there is only one; the number itself, where the head is made for regression.

    Args:
        labels: in the order of the logits.
        start: where the logits begin in a row.
        problem: `problem_type` of config.json; empty when it does not say.
    """

    def __init__(self, labels: Sequence[str], start: int, problem: str = "") -> None:
        self._labels = tuple(labels)
        self._start = start
        if problem == "regression":
            self._probabilities: Callable[[Vectors], Vectors] = lambda logits: logits
        elif problem == "multi_label_classification" or len(labels) == 1:
            self._probabilities = _sigmoid
        else:
            self._probabilities = softmax

    def read(self, rows: "Sequence[Row]", texts: Sequence[str] = ()) -> list[Verdict]:
        """See `Task`."""
        import numpy as np

        if not rows:
            return []
        logits = np.stack(rows)[:, self._start :].astype(np.float32)
        return _verdicts(self._probabilities(logits), self._labels)


class ZeroShotClassifier:
    """The label whose descriptions are nearest.

    Args:
        labels: names in order.
        owner: per description, the position of its label.
        vectors: normalised embeddings of the descriptions, [descriptions, width].
    """

    def __init__(self, labels: Sequence[str], owner: Sequence[int], vectors: "Vectors") -> None:
        import numpy as np

        self._labels = tuple(labels)
        self._vectors = vectors
        # Descriptions of a label are neighbours, so that one reduction finds the best of each label.
        assert list(owner) == sorted(owner), "descriptions must be grouped by label"
        self._starts = np.searchsorted(np.asarray(owner), np.arange(len(self._labels)))
        self.temperature = calibrate(vectors @ vectors.T, owner, len(self._labels))

    def read(self, rows: "Sequence[Row]", texts: Sequence[str] = ()) -> list[Verdict]:
        """See `Task`."""
        import numpy as np

        if not rows:
            return []
        vectors = np.stack(rows)[:, : self._vectors.shape[1]].astype(np.float32)
        best = np.maximum.reduceat(vectors @ self._vectors.T, self._starts, axis=1)
        return _verdicts(softmax((best / self.temperature).astype(np.float32)), self._labels)


class TokenClassifier:
    """Spans from a token-classification head.

    Args:
        labels: in the order of the logits.
        aggregation: how tokens become spans; see `spans`.
        align: finds texts' tokens in them (`tokens.Tokenizer.align`).
    """

    def __init__(
        self, labels: Sequence[str], aggregation: Aggregation, align: Callable[[Sequence[str]], list[Alignment]]
    ) -> None:
        self._labels = tuple(labels)
        self._outside = self._labels.index(OUTSIDE) if OUTSIDE in self._labels else -1
        self._aggregation = aggregation
        self._align = align

    def read(self, rows: "Sequence[Row]", texts: Sequence[str]) -> list[Verdict]:
        """See `Task`."""
        # Where every token is most likely O, no strategy finds a span: most texts are not tokenised again.
        wanted = [i for i, row in enumerate(rows) if (row.argmax(-1) != self._outside).any()]
        verdicts = [Verdict()] * len(rows)
        if wanted:
            for i, alignment in zip(wanted, self._align([texts[i] for i in wanted]), strict=True):
                verdicts[i] = self._verdict(rows[i], alignment)
        return verdicts

    def _verdict(self, row: "Row", alignment: Alignment) -> Verdict:
        spans = merge(softmax(row), alignment, self._labels, self._aggregation)
        best = max(spans, key=lambda span: span.score, default=None)
        return Verdict(best.label, best.score, spans) if best else Verdict()


def calibrate(similarity: "Vectors", owner: Sequence[int], labels: int) -> float:
    """The softmax temperature with the least log loss when each description is sorted by the others.

    Args:
        similarity: cosines between descriptions, [n, n].
        owner: the label of each.
        labels: how many labels there are.
    """
    import numpy as np

    own = np.asarray(owner)
    held_out = np.array(similarity, np.float32)
    np.fill_diagonal(held_out, -np.inf)
    best = np.stack([held_out[:, own == label].max(1) for label in range(labels)], axis=1)
    # A label's only description has nothing to be compared with.
    usable = np.isfinite(best[np.arange(len(own)), own])
    if usable.sum() < 2 * labels:
        return TEMPERATURE_DEFAULT
    best, own = best[usable], own[usable]

    def loss(temperature: float) -> float:
        logits = best / temperature
        top = logits.max(1)
        total = np.log(np.exp(logits - top[:, None]).sum(1)) + top
        return float((total - logits[np.arange(len(own)), own]).mean())

    return min(TEMPERATURES, key=loss)


def build(
    info: BackendInfo,
    labels: Mapping[str, Sequence[str]],
    embed: "Callable[[Sequence[str]], Vectors]",
    align: Callable[[Sequence[str]], list[Alignment]] | None = None,
    aggregation: Aggregation = "simple",
    problem: str = "",
) -> dict[str, Task]:
    """The tasks that the loaded model offers.

    Args:
        info: of the backend.
        labels: for zero-shot, each with its descriptions.
        embed: embeds descriptions; called once.
        align: of the tokenizer; needed by models with a token-classification head only.
        aggregation: of their tokens to spans.
        problem: what a sequence-classification head was made for; see `HeadClassifier`.
    """
    tasks: dict[str, Task] = {}
    if info.per_token:
        assert align is not None, "spans need the tokenizer"
        return {"tokens": TokenClassifier(info.labels, aggregation, align)}
    if info.embedding_width:
        tasks["embed"] = tasks["novelty"] = NoVerdict()
    if info.labels:
        tasks["classify"] = HeadClassifier(info.labels, info.embedding_width, problem)
    elif info.embedding_width:
        pairs = [(i, text) for i, texts in enumerate(labels.values()) for text in texts]
        vectors = embed([text for _, text in pairs])
        tasks["classify"] = ZeroShotClassifier(list(labels), [owner for owner, _ in pairs], vectors)
    return tasks


def find(tasks: Mapping[str, Task], name: str, model: str) -> Task:
    """The task of that name.

    Raises:
        Permanent: naming those there are.
    """
    task = tasks.get(name)
    if task is None:
        hint = "; text generation is not a task of analyze but has a door of its own" if name == "generate" else ""
        offered = ", ".join(sorted(tasks))
        raise Permanent(f"task '{name}' is not available with model '{model}'; it offers {offered}{hint}")
    return task


def _sigmoid(logits: "Vectors") -> "Vectors":
    import numpy as np

    # Not 1 / (1 + exp(-x)), which overflows: the same in other words.
    half: Vectors = 0.5 + 0.5 * np.tanh(0.5 * logits)
    return half


def _verdicts(probabilities: "Vectors", labels: Sequence[str]) -> list[Verdict]:
    """The label with the highest number of each row, and that number; [rows, labels]."""
    best = probabilities.argmax(1)
    scores = probabilities.max(1)
    return [Verdict(labels[i], float(score)) for i, score in zip(best.tolist(), scores.tolist(), strict=True)]
