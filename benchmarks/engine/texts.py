"""The two workloads, cut to the model's limit so that every system sees the same tokens.

`mix`: log-normal lengths, 88% around 20 tokens and 12% around 210, drawn from the model's own vocabulary with a
Zipf-like weight; 30% carry an address that the tokenizer cuts to pieces. `logs`: real lines, shuffled with a seed.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

LENGTH_MAX = 256
SEED = 7
LONG_SHARE, LONG_MEDIAN, LONG_SIGMA = 0.12, 210, 0.35
SHORT_MEDIAN, SHORT_SIGMA = 20, 0.55
WORDS_MAX = 12_000
REPOSITORY = Path(__file__).resolve().parent.parent.parent
REAL_LOGS = REPOSITORY.parent / "shared" / "data" / "logs"
LINES_MIN = 200


class Workload(NamedTuple):
    """Texts, each at most 256 tokens long, and their lengths in tokens (special tokens included)."""

    name: str
    source: str
    texts: list[str]
    lengths: list[int]

    def thin(self, step: int) -> "Workload":
        """Every `step`-th text by length, in the order of arrival: the same lengths in a smaller set."""
        if step <= 1:
            return self
        by_length = sorted(range(len(self.texts)), key=self.lengths.__getitem__)
        kept = sorted(by_length[step // 2 :: step])
        name = f"{self.name}/{step}"
        return Workload(name, self.source, [self.texts[i] for i in kept], [self.lengths[i] for i in kept])

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def mix(count: int, tokenizer: Any) -> Workload:
    chance = random.Random(SEED)
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    words = sorted((w for w in vocabulary if w.isalpha() and w.isascii() and len(w) > 1), key=vocabulary.__getitem__)
    words = words[:WORDS_MAX]
    weights = [1.0 / (rank + 20) for rank in range(len(words))]
    texts = []
    for _ in range(count):
        median, sigma = (LONG_MEDIAN, LONG_SIGMA) if chance.random() < LONG_SHARE else (SHORT_MEDIAN, SHORT_SIGMA)
        length = int(min(400, max(6, chance.lognormvariate(math.log(median), sigma))))
        chosen = chance.choices(words, weights, k=length - 2)
        if chance.random() < 0.3:
            address = f"{chance.choice(words)}{chance.randrange(99)}@{chance.choice(words)}.com"
            chosen[chance.randrange(len(chosen))] = address
        texts.append(" ".join(chosen))
    return cut("mix", f"log-normal mix, seed {SEED}", texts, tokenizer)


def logs(count: int, tokenizer: Any, file: Path | None) -> Workload | None:
    """Real lines from `file`, the repository's neighbour, or this host; None where there are too few."""
    for source, files in _log_sources(file):
        lines = [line for each in files for line in _lines(each)]
        if len(lines) >= min(count, LINES_MIN):
            random.Random(SEED).shuffle(lines)
            return cut("logs", f"{len(lines):,} lines of {source}", lines[:count], tokenizer)
    return None


def cut(name: str, source: str, texts: Sequence[str], tokenizer: Any) -> Workload:
    """Ends texts where their 256th token would be."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    kept = []
    for text, encoded in zip(texts, tokenizer.encode_batch(list(texts)), strict=True):
        # Two places are for [CLS] and [SEP].
        long = len(encoded.ids) > LENGTH_MAX
        kept.append(text[: encoded.offsets[LENGTH_MAX - 2][1]] if long else text)
    lengths = [len(encoded.ids) for encoded in tokenizer.encode_batch(kept)]
    assert max(lengths) <= LENGTH_MAX, "a cut text grew"
    return Workload(name, source, kept, lengths)


def _log_sources(file: Path | None) -> list[tuple[str, list[Path]]]:
    if file is not None:
        return [(file.name, [file])]
    return [
        ("Loghub (real systems)", sorted(REAL_LOGS.glob("*.log"))),
        ("this host's /var/log", sorted(Path("/var/log").glob("*.log"))),
    ]


def _lines(file: Path) -> list[str]:
    try:
        content = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line.strip() for line in content.splitlines() if line.strip()]
