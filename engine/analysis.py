"""What the engine says about a text, read from a call's outcomes."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.failures import Reason, reason_of
from engine.novelty import Novelty
from engine.results import Output
from engine.spans import Span
from engine.tasks import Task


@dataclass(frozen=True, slots=True)
class Analysis:
    """What the engine says about one text.

    Attributes:
        label: of the task, or empty; for the task `tokens` that of the span with the highest score.
        score: of the label, in [0, 1]; for the task `novelty` the novelty.
        novelty: distance to what the stream usually says, in [0, 1]; 0 without a stream.
        embedding: little-endian float16, normalised; only when asked for.
        token_count: tokens the model saw.
        truncated: whether tokens were dropped.
        error: why there is no result for this text, or None.
        reason: of the error, one word: `text`, `deadline`, `device`, `model` or `stopped` (see `failures`); or empty.
        model: which model made it, as configured.
        model_version: its version when the call began; a model may be replaced between two calls.
        dropped_tokens: tokens that truncation took away.
        spans: parts of the text with labels of their own, in order; of the task `tokens` only.
    """

    label: str = ""
    score: float = 0.0
    novelty: float = 0.0
    embedding: bytes | None = None
    token_count: int = 0
    truncated: bool = False
    error: str | None = None
    reason: Reason = ""
    model: str = ""
    model_version: str = ""
    dropped_tokens: int = 0
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """How a call's outcomes are to be read.

    Attributes:
        task: gives label and score.
        width: of the embedding.
        embed: whether embeddings are wanted.
        novelty: of all streams, or None when it is off.
        novelty_is_score: the task is `novelty`.
        stream: whose texts they are.
        model: which model, as configured.
        model_version: its version.
    """

    task: Task
    width: int
    embed: bool
    novelty: Novelty | None
    novelty_is_score: bool
    stream: str
    model: str = ""
    model_version: str = ""

    def read(self, outcomes: Sequence[Output | Exception | None], texts: Sequence[str]) -> list[Analysis]:
        """One analysis per outcome of `texts`, in order; learns what the stream says."""
        outputs = [outcome for outcome in outcomes if isinstance(outcome, Output)]
        rows = [output.row for output in outputs]
        computed = [text for text, each in zip(texts, outcomes, strict=True) if isinstance(each, Output)]
        verdicts = self.task.read(rows, computed)
        news = [0.0] * len(rows)
        if self.novelty is not None and self.stream:
            news = self.novelty.read(self.stream, rows)
        good = iter(
            Analysis(
                label=verdict.label,
                score=new if self.novelty_is_score else verdict.score,
                novelty=new,
                embedding=output.row[: self.width].astype("<f2").tobytes() if self.embed and self.width else None,
                token_count=output.tokens,
                truncated=output.dropped > 0,
                dropped_tokens=output.dropped,
                model=self.model,
                model_version=self.model_version,
                spans=verdict.spans,
            )
            for output, verdict, new in zip(outputs, verdicts, news, strict=True)
        )
        return [next(good) if isinstance(each, Output) else self._failed(each) for each in outcomes]

    def _failed(self, error: Exception | None) -> Analysis:
        return Analysis(error=str(error), reason=reason_of(error), model=self.model, model_version=self.model_version)


def failures(outcomes: Sequence[Output | Exception | None]) -> dict[str, int]:
    """How many texts failed, by reason."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            reason = reason_of(outcome)
            counts[reason] = counts.get(reason, 0) + 1
    return counts
