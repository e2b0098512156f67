"""Measures the engine on a file of texts: capacity first, then latency at a share of it.

Capacity: all texts at once, background priority. Latency: single texts, online priority, at Poisson times
that do not wait for answers (open loop), so that a queue that builds up is seen and not hidden.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from engine.config import DEFAULT_MODEL, CacheConfig, EngineConfig
from engine.service import Engine, EngineStats, Priority
from sluice.connections import TelemetryConfig
from sluice.errors import Backpressure, ConfigError
from sluice.telemetry import Telemetry

_SEED: Final = 7


def section(model: str | None, device: str, precision: str, threads: int, *, caches: bool = True) -> EngineConfig:
    """The engine's configuration from command-line values."""
    tree = {"model": model or DEFAULT_MODEL, "device": device, "precision": precision, "threads": threads}
    config = msgspec.convert(tree, EngineConfig)
    if caches:
        return config
    return msgspec.structs.replace(config, caches=CacheConfig(token_bytes_max=0, result_bytes_max=0))


def read_texts(file: Path, limit: int) -> list[str]:
    """Up to `limit` lines that are not blank.

    Raises:
        ConfigError: there is none.
    """
    texts: list[str] = []
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if text := line.strip():
                texts.append(text)
            if len(texts) == limit:
                break
    if not texts:
        raise ConfigError(f"{file}: no texts in it")
    return texts


def plan(config: EngineConfig) -> dict[str, str]:
    """What the engine chooses on this machine, each with its reason."""

    async def start() -> dict[str, str]:
        engine = Engine(config, _telemetry())
        try:
            await engine.start()
            return engine.plan()
        finally:
            await engine.close()

    return asyncio.run(start())


def run(config: EngineConfig, texts: Sequence[str], seconds: float, load: float) -> dict[str, Any]:
    """Measures; see the module's docstring.

    Args:
        config: of the engine.
        texts: what to analyse.
        seconds: for the latencies.
        load: share of the capacity at which they are taken.
    """
    return asyncio.run(_run(config, texts, seconds, load))


async def _run(config: EngineConfig, texts: Sequence[str], seconds: float, load: float) -> dict[str, Any]:
    engine = Engine(config, _telemetry())
    try:
        await engine.start()
        begun = time.perf_counter()
        await engine.analyze(texts)
        took_s = time.perf_counter() - begun
        full = engine.stats()
        latencies = await _open_loop(engine, texts, load * len(texts) / took_s, seconds)
        return _result(config, engine, texts, took_s, full, latencies)
    finally:
        await engine.close()


def _result(
    config: EngineConfig,
    engine: Engine,
    texts: Sequence[str],
    took_s: float,
    full: EngineStats,
    latencies: list[float],
) -> dict[str, Any]:
    latencies.sort()
    return {
        "texts_per_s": len(texts) / took_s,
        "tokens_per_s": full.tokens / took_s,
        "padding_share": full.padding_share,
        "p50_ms": _percentile(latencies, 0.50) * 1e3,
        "p99_ms": _percentile(latencies, 0.99) * 1e3,
        "device_busy_share": full.device_busy_s / took_s,
        "texts": len(texts),
        "latency_samples": len(latencies),
        "model": config.model,
        "model_version": engine.model_version,
    }


async def _open_loop(engine: Engine, texts: Sequence[str], rate: float, seconds: float) -> list[float]:
    """Latencies in seconds of single texts that arrive `rate` times a second."""
    chance = random.Random(_SEED)
    latencies: list[float] = []

    async def one(text: str, due: float) -> None:
        try:
            await engine.analyze([text], priority=Priority.ONLINE)
        except Backpressure as full:
            await asyncio.sleep(full.retry_after_s)
        # From when it was due, not from when it was sent: a late sender hides what it is late by.
        latencies.append(time.perf_counter() - due)

    due = time.perf_counter()
    end = due + seconds
    async with asyncio.TaskGroup() as group:
        while (due := due + chance.expovariate(rate)) < end:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(one(chance.choice(texts), due))
    return latencies


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def _telemetry() -> Telemetry:
    return Telemetry("engine", TelemetryConfig(log_level="warning"))
