"""From logits per token to spans of text: the merging of token classification (named-entity recognition). Pure.

The rules are those of transformers' token-classification pipeline (`aggregation_strategy`), which models are published
and judged with, and tests hold the two equal: special tokens are skipped; each token gets a probability per label;
`first`, `average` and `max` let a word's tokens agree on one label; then neighbours with the same label after its B- or
I- prefix become one span, a B- begins a new one, and spans labelled O are dropped. A span's score is the mean of its
tokens' (or words') probabilities.

Any hub model with a token-classification head will do, such as dslim/bert-base-NER (names of persons, places,
organisations) with `simple` or `first`. What truncation drops has no spans; `Analysis.truncated` says so.

A word, for the strategies that know words, is what the tokenizer marks as one (WordPiece's ## prefix); other
tokenizers know none, and tokens without a blank between them are taken as one word.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Numbers = npt.NDArray[np.float32]

Aggregation = Literal["simple", "first", "average", "max"]

# The label of what is nothing.
OUTSIDE: Final = "O"


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a text, and what it is.

    Attributes:
        start: its first character's position in the text (code points, as Python counts them).
        end: the position behind its last character.
        label: without B- or I-.
        score: probability, in [0, 1].
    """

    start: int
    end: int
    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Alignment:
    """Where a text's tokens are in it.

    Attributes:
        offsets: integers [tokens, 2]: first character of each token, and the one behind its last.
        special: booleans [tokens]: added by the tokenizer, like [CLS].
        continues: booleans [tokens]: continues the word of the token before.
    """

    offsets: "npt.NDArray[np.int64]"
    special: "npt.NDArray[np.bool_]"
    continues: "npt.NDArray[np.bool_]"


def softmax(logits: "npt.NDArray[np.floating[Any]]") -> "Numbers":
    """Probabilities, float32 [tokens, labels]."""
    import numpy as np

    weights = np.exp((logits - logits.max(-1, keepdims=True)).astype(np.float32))
    shares: Numbers = weights / weights.sum(-1, keepdims=True)
    return shares


def merge(shares: "Numbers", alignment: Alignment, labels: Sequence[str], aggregation: Aggregation) -> tuple[Span, ...]:
    """The spans of one text, in order.

    Args:
        shares: probabilities, [tokens, labels].
        alignment: of the same tokens.
        labels: in the order of the columns.
        aggregation: see the module's docstring.
    """
    import numpy as np

    tokens = np.flatnonzero(~alignment.special)
    if not len(tokens):
        return ()
    shares, offsets = shares[tokens], alignment.offsets[tokens]
    starts = np.arange(len(tokens))
    if aggregation != "simple":
        own = ~alignment.continues[tokens]
        own[0] = True  # whatever comes first begins a word
        starts = np.flatnonzero(own)
        shares = _by_word(shares, starts, aggregation)
    ends = np.append(starts[1:], len(tokens)) - 1
    best = shares.argmax(1)
    scores = shares[np.arange(len(best)), best]
    return _grouped([labels[i] for i in best.tolist()], scores, offsets[starts, 0], offsets[ends, 1])


def _by_word(shares: "Numbers", starts: "npt.NDArray[np.intp]", aggregation: Aggregation) -> "Numbers":
    """One row of probabilities per word."""
    import numpy as np

    if aggregation == "first":
        return shares[starts]
    words = np.split(shares, starts[1:])
    if aggregation == "average":
        return np.stack([word.mean(0) for word in words])
    return np.stack([word[word.max(1).argmax()] for word in words])


def _grouped(
    names: Sequence[str], scores: "Numbers", starts: "npt.NDArray[np.int64]", ends: "npt.NDArray[np.int64]"
) -> tuple[Span, ...]:
    """Joins neighbours of one label."""
    tags = [(name[:2] == "B-", name[2:] if name[:2] in {"B-", "I-"} else name) for name in names]
    edges = [0]
    for i in range(1, len(tags)):
        begins, label = tags[i]
        if begins or label != tags[i - 1][1]:
            edges.append(i)
    spans = []
    for first, behind in zip(edges, [*edges[1:], len(tags)], strict=True):
        label = names[first].split("-", 1)[-1]
        if label != OUTSIDE:
            score = float(scores[first:behind].mean())
            spans.append(Span(int(starts[first]), int(ends[behind - 1]), label, score))
    return tuple(spans)
