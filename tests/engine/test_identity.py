"""What a result goes by: the version says everything that changes it, and caches never mix two set-ups."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import CacheConfig, EngineConfig
from engine.service import Engine

NO_CACHES = CacheConfig(token_bytes_max=0, result_bytes_max=0)
LABELS = {"disk": ("disk full", "disk lost"), "login": ("user login failed",)}
Open = Callable[..., Any]


def config(folder: Path, **settings: Any) -> EngineConfig:
    fixed = {"device": "cpu", "backend": "torch", "precision": "fp32", "fit_seconds_max": 0.01, "threads": 1}
    return EngineConfig(model=str(folder), **{**fixed, **settings})


async def vector(engine: Engine) -> Any:
    (analysis,) = await engine.analyze(["the disk is full"], task="embed")
    assert analysis.embedding is not None
    return np.frombuffer(analysis.embedding, "<f2").astype(np.float32)


async def test_a_cached_vector_is_never_one_of_another_pooling(
    open_engine: Open, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    caches = CacheConfig(directory=str(tmp_path))
    for pooling in ("mean", "cls"):
        engine = await open_engine(config(tiny_models["bert"], pooling=pooling, caches=caches))
        kept = await vector(engine)
        await engine.close()
    true = await vector(await open_engine(config(tiny_models["bert"], pooling="cls", caches=NO_CACHES)))
    assert float(kept @ true) > 0.999


@pytest.mark.parametrize("changed", [{"pooling": "cls"}, {"labels": LABELS}])
async def test_what_changes_a_verdict_changes_the_version(
    open_engine: Open, tiny_models: dict[str, Path], changed: dict[str, Any]
) -> None:
    usual = (await open_engine(config(tiny_models["bert"]))).model_version
    assert usual.count("-") == 1, "the version of a default set-up stays as it always was"
    assert (await open_engine(config(tiny_models["bert"], pooling="mean"))).model_version == usual
    versions = {(await open_engine(config(tiny_models["bert"], **changed))).model_version for _ in range(2)}
    assert len(versions) == 1
    assert versions != {usual}


async def test_the_aggregation_of_spans_is_part_of_the_version_where_there_are_spans(
    open_engine: Open, tiny_models: dict[str, Path]
) -> None:
    settings: tuple[dict[str, Any], ...] = ({}, {"span_aggregation": "first"}, {"span_aggregation": "max"})
    for name, count in (("ner", 3), ("head", 1)):
        versions = {(await open_engine(config(tiny_models[name], **each))).model_version for each in settings}
        assert len(versions) == count


async def test_other_labels_use_the_outputs_that_are_kept(
    open_engine: Open, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    caches = CacheConfig(directory=str(tmp_path))
    for labels in (None, LABELS):
        own = {} if labels is None else {"labels": labels}
        engine = await open_engine(config(tiny_models["bert"], caches=caches, **own))
        (got,) = await engine.analyze(["the disk is full"])
        hits = engine.stats().result_cache_hits
        await engine.close()
    assert hits == 1
    assert got.label in LABELS
