"""Continuous batching that is closed as soon as it is open: what `sluice engine plan` does."""

import logging
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.generation_batched import ContinuousDriver
from engine.generation_model import load_generative


def test_closing_at_once_says_nothing(generative: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    model = load_generative(EngineConfig(model=str(generative["llama"]), device="cpu"))
    told = logging.getLogger("ContinuousBatchingLogger")
    told.addHandler(caplog.handler)
    try:
        for _ in range(5):  # whether its thread is ahead is chance
            ContinuousDriver(model, lambda _: None).close()
    finally:
        told.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.name == told.name] == []
