"""What the engine says about a text, read from a call's outcomes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from engine.flights import DeadlinePassed
from engine.novelty import Novelty
from engine.results import Output
from engine.tasks import Task
from sluice.errors import Permanent


class BadText(Permanent):
    """A text that cannot be analysed, whatever the engine's state."""


@dataclass(frozen=True, slots=True)
class Analysis:
    """What the engine says about one text.

    Attributes:
        label: of the task, or empty.
        score: of the label, in [0, 1]; for the task `novelty` the novelty.
        novelty: distance to what the stream usually says, in [0, 1]; 0 without a stream.
        embedding: little-endian float16, normalised; only when asked for.
        token_count: tokens the model saw.
        truncated: whether tokens were dropped.
        error: why there is no result for this text, or None.
    """

    label: str = ""
    score: float = 0.0
    novelty: float = 0.0
    embedding: bytes | None = None
    token_count: int = 0
    truncated: bool = False
    error: str | None = None


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
    """

    task: Task
    width: int
    embed: bool
    novelty: Novelty | None
    novelty_is_score: bool
    stream: str

    def read(self, outcomes: Sequence[Output | Exception | None]) -> list[Analysis]:
        """One analysis per outcome, in order; learns what the stream says."""
        outputs = [outcome for outcome in outcomes if isinstance(outcome, Output)]
        rows = [output.row for output in outputs]
        verdicts = self.task.read(rows)
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
            )
            for output, verdict, new in zip(outputs, verdicts, news, strict=True)
        )
        return [next(good) if isinstance(each, Output) else Analysis(error=str(each)) for each in outcomes]


_REASONS: Final[dict[type, str]] = {BadText: "text", DeadlinePassed: "deadline"}


def failures(outcomes: Sequence[Output | Exception | None]) -> dict[str, int]:
    """How many texts failed, by reason: `text`, `deadline` or `device`."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            reason = _REASONS.get(type(outcome), "device")
            counts[reason] = counts.get(reason, 0) + 1
    return counts
