"""Fixtures of the engine's tests. The packaged model is loaded once per session."""

import io
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from engine import models
from engine.config import DEFAULT_MODEL, CacheConfig, EngineConfig
from engine.models import ModelCard
from engine.service import Engine
from engine.tokens import Tokenizer
from sluice.connections import TelemetryConfig
from sluice.telemetry import Telemetry
from tests.engine import tiny


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry("test", TelemetryConfig(log_level="debug"), stream=io.StringIO())


@pytest.fixture(scope="session")
def minilm() -> ModelCard:
    return models.read_card(DEFAULT_MODEL, models.locate(DEFAULT_MODEL, allow_download=False))


@pytest.fixture(scope="session")
def minilm_tokenizer(minilm: ModelCard) -> Tokenizer:
    return Tokenizer(models.load_tokenizer(minilm), minilm.length_max)


@pytest.fixture(scope="session")
def plain(minilm: ModelCard) -> Any:
    """The packaged model in plain transformers."""
    return models.load_model(minilm)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models with random weights, one folder per kind, made here."""
    return tiny.build_all(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> CacheConfig:
    """Where models converted to OpenVINO are kept, so that each is converted once per session."""
    return CacheConfig(directory=str(tmp_path_factory.mktemp("converted")))


@pytest.fixture
async def open_engine() -> AsyncIterator[Callable[..., Any]]:
    """Starts engines; closes them afterwards."""
    async with AsyncExitStack() as stack:

        async def start(config: EngineConfig | None = None, **arguments: Any) -> Engine:
            sink = Telemetry("test", TelemetryConfig(log_level="debug"), stream=io.StringIO())
            engine = Engine(config or EngineConfig(), sink, **arguments)
            stack.push_async_callback(engine.close)
            await engine.start()
            return engine

        yield start
