"""What plain transformers say, one text at a time: the reference for every path through the engine.

No code of the engine's is used beyond the card (where a model is, its longest input, its pooling) and the labels'
temperature, which `test_tasks` is about.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine import models
from engine.config import NoveltyConfig
from engine.models import ModelCard
from engine.service import Analysis
from engine.spans import Span
from tests.engine import test_spans

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Expected:
    """Of one text: what a task reads of it, and how far it is from the next best answer."""

    embedding: Vector | None = None
    shares: dict[str, float] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()
    margin: float = 1.0
    novelty: float = 0.0


def card_of(folder: Path) -> ModelCard:
    return models.read_card(str(folder), folder)


def _one_by_one(card: ModelCard, model: Any, texts: Sequence[str]) -> list[Any]:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(card.folder))
    found = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=card.length_max, return_tensors="pt")
        with torch.inference_mode():
            found.append(model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]))
    return found


def embeddings(model: Any, card: ModelCard, texts: Sequence[str]) -> Vector:
    """What the model's own documentation does: mean over tokens (or [CLS]), normalised; [texts, width]."""
    import torch

    rows = []
    for output in _one_by_one(card, model, texts):
        hidden = output.last_hidden_state[0]
        vector = hidden[0] if card.pooling == "cls" else hidden.mean(0)
        rows.append(torch.nn.functional.normalize(vector, dim=0).numpy())
    return np.stack(rows)


def encoder(folder: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(str(folder)).eval()


def embedded(folder: Path, texts: Sequence[str]) -> list[Expected]:
    return [Expected(embedding=row) for row in embeddings(encoder(folder), card_of(folder), texts)]


def classified(folder: Path, texts: Sequence[str]) -> list[Expected]:
    """By the model's own head: each label's softmax probability."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(str(folder)).eval()
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    outputs = _one_by_one(card_of(folder), model, texts)
    return [
        Expected(shares=dict(zip(names, torch.softmax(each.logits[0], 0).tolist(), strict=True))) for each in outputs
    ]


def zero_shot(
    folder: Path, texts: Sequence[str], labels: dict[str, tuple[str, ...]], temperature: float
) -> list[Expected]:
    """Softmax over labels of the highest cosine to one of the label's descriptions, divided by the temperature."""
    model, card = encoder(folder), card_of(folder)
    known = {label: embeddings(model, card, descriptions) for label, descriptions in labels.items()}
    found = []
    for vector in embeddings(model, card, texts):
        weights = {label: math.exp(max(rows @ vector) / temperature) for label, rows in known.items()}
        total = sum(weights.values())
        found.append(Expected(shares={label: weight / total for label, weight in weights.items()}))
    return found


def spans(folder: Path, texts: Sequence[str]) -> list[Expected]:
    """By transformers' pipeline; `margin` is how much more likely the best label is than the next, at least."""
    import torch

    pipeline = test_spans.reference(folder, "simple")
    found = []
    for text, output in zip(texts, _one_by_one(card_of(folder), pipeline.model, texts), strict=True):
        best, next_best = torch.softmax(output.logits[0], -1).topk(2, -1).values.T
        found.append(Expected(spans=tuple(test_spans.plain(pipeline, text)), margin=float((best - next_best).min())))
    return found


def novelties(folder: Path, texts: Sequence[str], config: NoveltyConfig) -> list[Expected]:
    """The formula of `novelty`, word by word; `margin` is how far a text is from being sorted in otherwise."""
    stream = PlainStream(config)
    return [stream.read(row) for row in embeddings(encoder(folder), card_of(folder), texts)]


class PlainStream:
    """What a stream usually says, without any of the shortcuts that make it fast."""

    def __init__(self, config: NoveltyConfig) -> None:
        self.config = config
        self.seen = 0
        self.kinds: list[Vector] = []
        self.uses: list[float] = []
        self.merged = self.replaced = 0

    def read(self, vector: Vector) -> Expected:
        trust = min(1.0, self.seen / self.config.warmup_texts)
        self.seen += 1
        # A use halves over 5000 texts.
        self.uses = [use * 0.5 ** (1 / 5000) for use in self.uses]
        cosines = sorted(((float(kind @ vector), i) for i, kind in enumerate(self.kinds)), reverse=True)
        if not cosines:
            self.kinds.append(vector)
            self.uses.append(1.0)
            return Expected(novelty=0.0)
        best, nearest = cosines[0]
        if best >= self.config.merge_similarity:
            self.merged += 1
            self.uses[nearest] += 1
            # The mean of its texts; but for a kind in long use at least a fiftieth of the newest.
            rate = max(0.02, 1 / self.uses[nearest])
            moved = (1 - rate) * self.kinds[nearest] + rate * vector
            self.kinds[nearest] = moved / np.linalg.norm(moved)
        elif len(self.kinds) < self.config.centroids_max:
            self.kinds.append(vector)
            self.uses.append(1.0)
        else:
            self.replaced += 1
            least = self.uses.index(min(self.uses))
            self.kinds[least], self.uses[least] = vector, 1.0
        return Expected(novelty=trust * min(1.0, max(0.0, 1 - best)), margin=abs(best - self.config.merge_similarity))


def vector_of(analysis: Analysis) -> Vector:
    return np.frombuffer(analysis.embedding or b"", "<f2").astype(np.float32)


def cosine(left: Vector, right: Vector) -> float:
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))
