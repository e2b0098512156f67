"""Fixtures of the engine's tests. The packaged model is loaded once per session."""

import os

# As the engine does before it imports PyTorch; here fixtures import it first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import io
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from engine import models
from engine.config import DEFAULT_MODEL, CacheConfig, EngineConfig, GenerationConfig
from engine.generation import Generator
from engine.generation_model import load_generative
from engine.model_place import locate
from engine.models import ModelCard
from engine.service import Engine
from engine.tokens import Tokenizer
from sluice.connections import TelemetryConfig
from sluice.telemetry import Telemetry
from tests.engine import tiny, tiny_generation


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry("test", TelemetryConfig(log_level="debug"), stream=io.StringIO())


@pytest.fixture(scope="session")
def minilm() -> ModelCard:
    return models.read_card(DEFAULT_MODEL, locate(DEFAULT_MODEL, allow_download=False))


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


@pytest.fixture(scope="session")
def generative(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models that generate text, made here."""
    return tiny_generation.build_all(tmp_path_factory.mktemp("generative"))


@pytest.fixture
async def open_generator() -> AsyncIterator[Callable[..., Any]]:
    """Starts generators; closes them afterwards."""
    async with AsyncExitStack() as stack:

        async def start(folder: Path, load: Any = load_generative, **limits: Any) -> Generator:
            small = {"cache_tokens_max": 4096, "prompt_tokens_max": 300, "new_tokens_max": 256, "step_tokens_max": 64}
            section = GenerationConfig(model=str(folder), **{**small, **limits})
            generator = Generator(EngineConfig(device="cpu", threads=1, generation=section), load)
            stack.push_async_callback(generator.close)
            await generator.start()
            return generator

        yield start
