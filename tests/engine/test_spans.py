"""Spans of text from logits per token: what transformers' own pipeline finds, on every path."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import models
from engine.config import CacheConfig, EngineConfig
from engine.service import Analysis, Engine
from engine.spans import Aggregation, Span, merge, softmax
from engine.tokens import Tokenizer
from sluice.errors import Permanent

STRATEGIES = get_args(Aggregation)
TEXTS = [
    "the disk of user alice is full",
    "user Alice Smith login failed on link",
    "naïve café ÜNÏCÖDÉ: memory lost",
    "磁盘已满 /dev/sda1",
    "an emoji 🚀 and one more 👩‍👩‍👧 failed",
    "memory-error, disk.full; user's link",
    "  blanks   in front\tand\nbetween  ",
    "x",
    ".",
    "started stopping linked losing " * 20,
    "ﬁle eﬀort ＦＵＬＬ width",
    "a\u0301b\u0301 combining",
    "\x00\x01 binary \ufffd junk",
    *[f"request {i} to {'x' * i} took {i} ms, user u{i} failed" for i in range(1, 40, 3)],
]


def reference(folder: Path, aggregation: str) -> Any:
    from transformers import AutoModelForTokenClassification, AutoTokenizer, TokenClassificationPipeline

    return TokenClassificationPipeline(
        model=AutoModelForTokenClassification.from_pretrained(str(folder)).eval(),
        tokenizer=AutoTokenizer.from_pretrained(str(folder)),
        aggregation_strategy=aggregation,
        device="cpu",
    )


def plain(pipeline: Any, text: str) -> list[Span]:
    """One text through the pipeline; it warns of tokenizers that know no words, and so does our documentation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pipeline(text)
    return [Span(each["start"], each["end"], each["entity_group"], float(each["score"])) for each in found]


def config(folder: Path, **changes: Any) -> EngineConfig:
    settings = {"model": str(folder), "device": "cpu", "precision": "fp32", "fit_seconds_max": 0.05, **changes}
    return EngineConfig(**settings)


def same(found: tuple[Span, ...], expected: list[Span]) -> bool:
    places = [(span.start, span.end, span.label) for span in found]
    scores = np.array([span.score for span in found]) - np.array([span.score for span in expected] or [])
    return places == [(span.start, span.end, span.label) for span in expected] and bool((abs(scores) < 1e-4).all())


@pytest.mark.parametrize("name", ["ner", "ner-bytes"])
async def test_spans_equal_those_of_transformers_on_every_path(
    open_engine: Callable[..., Any], tiny_models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = tiny_models[name]
    pipeline = reference(folder, "simple")
    expected = [plain(pipeline, text) for text in TEXTS]
    assert sum(map(len, expected)) > len(TEXTS), "the model must find something"
    caches = CacheConfig(directory=str(tmp_path / "caches"))
    engine: Engine = await open_engine(config(folder, batch_tokens=128, caches=caches))
    for batch in (TEXTS, TEXTS, TEXTS[::-1]):  # computed in buckets, from the cache, and in another order
        found = await engine.analyze(batch, task="tokens")
        ordered = found if batch is TEXTS else found[::-1]
        assert all(same(each.spans, wanted) for each, wanted in zip(ordered, expected, strict=True))
        assert [each.error for each in found] == [None] * len(TEXTS)
    assert engine.stats().texts_computed == len(TEXTS)
    await engine.drain(10)
    afresh: Engine = await open_engine(config(folder, caches=CacheConfig(token_bytes_max=0, result_bytes_max=0)))
    alone = [(await afresh.analyze([text], task="tokens"))[0] for text in TEXTS]
    assert all(same(each.spans, wanted) for each, wanted in zip(alone, expected, strict=True))


@pytest.mark.parametrize("aggregation", STRATEGIES)
@pytest.mark.parametrize("name", ["ner", "ner-bytes"])
def test_merging_equals_transformers_for_any_logits(tiny_models: dict[str, Path], name: str, aggregation: str) -> None:
    pipeline = reference(tiny_models[name], aggregation)
    card = models.read_card(name, tiny_models[name])
    tokenizer = Tokenizer(models.load_tokenizer(card), 46)

    @settings(max_examples=60, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80), st.integers(0, 2**32 - 1))
    def holds(text: str, seed: int) -> None:
        (inputs,) = pipeline.preprocess(text, is_split_into_words=False)
        shape = (inputs["input_ids"].shape[1], len(card.labels))
        logits = np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 3
        found = merge(softmax(logits), tokenizer.align([text])[0], card.labels, aggregation)  # type: ignore[arg-type]
        assert same(found, postprocessed(pipeline, inputs, text, logits, aggregation))

    holds()


def postprocessed(pipeline: Any, inputs: Any, text: str, logits: Any, aggregation: str) -> list[Span]:
    import torch
    from transformers.pipelines.token_classification import AggregationStrategy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pipeline.postprocess(
            [{**inputs, "logits": torch.from_numpy(logits)[None], "sentence": text}], AggregationStrategy(aggregation)
        )
    return [Span(each["start"], each["end"], each["entity_group"], float(each["score"])) for each in found]


async def test_label_and_score_are_those_of_the_best_span_and_nothing_found_is_empty(
    open_engine: Callable[..., Any], tiny_models: dict[str, Path]
) -> None:
    engine: Engine = await open_engine(config(tiny_models["ner"], span_aggregation="first"))
    found: list[Analysis] = await engine.analyze([*TEXTS, "", "\ud800"], task="tokens")
    for analysis in found:
        best = max(analysis.spans, key=lambda span: span.score, default=None)
        assert (analysis.label, analysis.score) == ((best.label, best.score) if best else ("", 0.0))
    assert [bool(each.error) for each in found[-2:]] == [True, True]
    assert found[TEXTS.index("x")].truncated is False
    assert found[9].truncated is True
    assert all(span.end <= len(text) for text, each in zip(TEXTS, found, strict=False) for span in each.spans)


async def test_a_token_classifier_offers_nothing_else_and_says_so(
    open_engine: Callable[..., Any], tiny_models: dict[str, Path]
) -> None:
    engine: Engine = await open_engine(config(tiny_models["ner"]))
    for task in ("embed", "classify", "novelty", "generate"):
        with pytest.raises(Permanent, match=rf"task '{task}' is not available .* it offers tokens"):
            await engine.analyze(["ok"], task=task)


def test_texts_without_a_span_are_not_tokenised_again(tiny_models: dict[str, Path]) -> None:
    from engine.tasks import TokenClassifier, Verdict

    asked: list[str] = []
    tokenizer = Tokenizer(models.load_tokenizer(models.read_card("ner", tiny_models["ner"])), 46)

    def align(texts: Any) -> Any:
        asked.extend(texts)
        return tokenizer.align(texts)

    nothing = np.tile(np.array([5, 0, 0], np.float32), (4, 1))
    one = nothing.copy()
    one[2] = (0, 0, 5)
    subject = TokenClassifier(["O", "B-X", "I-Y"], "simple", align)
    none, some = subject.read([nothing, one], ["the disk", "the user"])
    assert none == Verdict()
    assert [(span.start, span.end, span.label) for span in some.spans] == [(4, 8, "Y")]
    assert asked == ["the user"]


@pytest.mark.parametrize("name", ["ner", "ner-bytes"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_within_its_stated_tolerance(
    tiny_models: dict[str, Path], name: str, precision: str
) -> None:
    """Cosine of a text's logits against fp32 above 0.999, as for embeddings."""
    from engine.torch_backend import open_backend

    chance = np.random.default_rng(7)
    rows = [chance.integers(4, 90, length).astype(np.int32) for length in (3, 17, 1, 40, 8)]
    logits = []
    for each in ("fp32", precision):
        section = config(tiny_models[name], precision=each)
        backend = open_backend(section, models.read_card(name, tiny_models[name]), {})
        assert backend.info.per_token
        assert backend.info.embedding_width == 0
        logits.append(backend.collect(backend.submit(rows, 40)))
        backend.close()
    for row, exact, half in zip(rows, *logits, strict=True):
        assert exact.shape == half.shape == (len(row), 6)
        assert half.dtype == np.float32
        a, b = exact.ravel(), half.ravel()
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999
