"""Measures the engine on a file of texts: capacity first, then latency at a share of it.

Capacity: all texts at once, background priority. Latency: single texts, online priority, at Poisson times
that do not wait for answers (open loop), so that a queue that builds up is seen and not hidden. The load is a share of
the texts that were computed a second, as single ones do not come with their like. What has no answer long after the
last one was sent is given up and counts with the time that it waited.

Fails: `ConfigError` for a file that is no text or holds none, before anything is loaded. A text that the engine
refuses is counted and costs the run nothing.
"""

import asyncio
import contextlib
import functools
import random
import time
import tomllib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from engine.config import GENERATION_NAME, CacheConfig, EngineConfig
from engine.service import Engine, EngineStats, Priority
from sluice.config import load
from sluice.connections import TelemetryConfig
from sluice.errors import Backpressure, ConfigError
from sluice.telemetry import Telemetry

# What is under way, and how much of it is done, in [0, 1].
Progress = Callable[[str, float], None]

_SEED: Final = 7
_PROBE_BYTES: Final = 1 << 16
# A longer line is read in pieces, so that a file without line ends does not fill the memory.
_LINE_CHARS_MAX: Final = 1 << 20
_PROGRESS_S: Final = 0.2
# Single texts without an answer: beyond this number the engine does not keep up, and no more are sent.
_UNANSWERED_MAX: Final = 10_000
# Which task is measured unless told: the first one that the model offers. Each reads every result of the device.
_TASKS: Final = ("classify", "tokens", "embed")


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured.

    Attributes:
        figures: by name; `p50_ms` and `p99_ms` are of `latencies_s`, which were taken at `load` of the capacity, and
            `chosen` is what the engine chose at start-up.
        latencies_s: of single online texts, ascending; at least so much for those without an answer.
        batches: of the full queue, by length class.
    """

    figures: Mapping[str, Any]
    latencies_s: Sequence[float]
    batches: Mapping[int, int]


def section(values: Mapping[str, Any], settings: Sequence[str] = ()) -> EngineConfig:
    """The engine's configuration from command-line values.

    Args:
        values: by key; None is left out.
        settings: more of them, as `key=value`, with dots between section and key.

    Raises:
        ConfigError: a key or value is wrong, or contradicts one of `values`.
    """
    tree: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
    for setting in settings:
        key, sign, value = setting.partition("=")
        if not sign:
            raise ConfigError(f"--set {setting[:64]!r}: not of the form key=value")
        # As the documentation names them, too.
        *parents, leaf = key.strip().removeprefix("engine.").split(".")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {setting[:64]!r}: '{parent}' is no section")
        option = None if parents else values.get(leaf)
        # An option that nobody gave has the default.
        if option not in (None, getattr(EngineConfig(), leaf, None)) and str(option) != value.strip():
            raise ConfigError(f"--set {setting[:64]!r} contradicts --{leaf} {option}: give one of them")
        inner[leaf] = _value(setting, value.strip())
    return load(EngineConfig, environ={}, overrides=tree)


def without_caches(config: EngineConfig) -> EngineConfig:
    """The same, with the token and the result cache switched off."""
    return msgspec.structs.replace(config, caches=CacheConfig(token_bytes_max=0, result_bytes_max=0))


def _value(setting: str, value: str) -> Any:
    if value[:1] not in {"[", "{"}:
        return value
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--set {setting[:64]!r}: not a valid TOML value: {error}") from error


def read_texts(file: Path, limit: int) -> list[str]:
    """Up to `limit` lines that are not blank; what is not UTF-8 in them is replaced.

    Raises:
        ConfigError: it cannot be read, is binary, or has no such line.
    """
    try:
        with file.open("rb") as content:
            probe = content.read(_PROBE_BYTES)
        if (at := probe.find(b"\0")) >= 0:
            raise ConfigError(f"{file}: not a text file: a zero byte at position {at} (UTF-16? it must be UTF-8)")
        if (wrong := probe.decode(errors="replace").count("\ufffd")) > len(probe) // 10:
            raise ConfigError(f"{file}: not a text file: {wrong} of its first {len(probe)} bytes are not UTF-8")
        texts = _lines(file, limit)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    if not texts:
        raise ConfigError(f"{file}: no texts in it, one a line")
    return texts


def _lines(file: Path, limit: int) -> list[str]:
    texts: list[str] = []
    with file.open(encoding="utf-8", errors="replace") as lines:
        while len(texts) < limit and (line := lines.readline(_LINE_CHARS_MAX)):
            if text := line.strip():
                texts.append(text)
    return texts


def plan(config: EngineConfig) -> dict[str, Any]:
    """What the engine chooses on this machine, each with its reason.

    The default model's choices by name, and beside them `models` (those of each further model, by its name) and
    `generation` (those of the model that generates text; empty when there is none).
    """

    async def start() -> dict[str, Any]:
        engine = Engine(config, _telemetry())
        try:
            await engine.start()
            models = {name: engine.plan(name) for name in config.models}
            return {**engine.plan(), "models": models, GENERATION_NAME: engine.plan(GENERATION_NAME)}
        finally:
            await engine.close()

    return asyncio.run(start())


def run(
    config: EngineConfig,
    texts: Sequence[str],
    seconds: float,
    load: float,
    progress: Progress = lambda *_: None,
    task: str = "",
) -> Measured:
    """Measures; see the module's docstring.

    Args:
        config: of the engine.
        texts: what to analyse.
        seconds: for the latencies.
        load: share of the capacity at which they are taken.
        progress: told now and then.
        task: what to do with the texts; empty: classify, or what else the model offers.

    Raises:
        Permanent: the model cannot be loaded, or does not offer the task.
        ConfigError: none of the texts has a result.
    """
    return asyncio.run(_run(config, texts, seconds, load, progress, task))


async def _run(
    config: EngineConfig, texts: Sequence[str], seconds: float, load: float, progress: Progress, task: str
) -> Measured:
    engine = Engine(config, _telemetry())
    try:
        progress("loading and measuring the model", 0.0)
        await engine.start()
        task = task or next((each for each in _TASKS if each in engine.tasks()), "")
        watching = asyncio.create_task(_watch(engine, len(texts), progress))
        begun = time.perf_counter()
        try:
            analyses = await engine.analyze(texts, task=task)
        finally:
            watching.cancel()
        took_s = time.perf_counter() - begun
        full = engine.stats()
        # The latency of a refusal says nothing.
        good = [text for text, analysis in zip(texts, analyses, strict=True) if analysis.error is None]
        if not good:
            raise ConfigError(f"none of the {len(texts)} texts has a result; the first: {analyses[0].error}")
        rate = load * (full.texts_computed + full.result_cache_hits) / took_s
        ask = functools.partial(engine.analyze, task=task, priority=Priority.ONLINE)
        latencies, unanswered = await _open_loop(ask, good, rate, seconds, progress)
        figures = _figures(config, engine, took_s, full, latencies)
        figures |= {"task": task, "load": load, "latency_unanswered": unanswered, "chosen": engine.plan()}
        return Measured(figures, latencies, full.batches)
    finally:
        await engine.close()


def _figures(
    config: EngineConfig, engine: Engine, took_s: float, full: EngineStats, latencies: Sequence[float]
) -> dict[str, Any]:
    devices = max(1, len(full.devices))
    return {
        "texts_per_s": full.texts / took_s,
        "tokens_per_s": full.tokens / took_s,
        "padding_share": full.padding_share,
        "p50_ms": percentile(latencies, 0.50) * 1e3,
        "p99_ms": percentile(latencies, 0.99) * 1e3,
        "device_busy_share": full.device_busy_s / took_s / devices,
        "texts": full.texts,
        "texts_computed": full.texts_computed,
        "texts_failed": full.texts_failed,
        "texts_truncated": full.texts_truncated,
        "seconds": took_s,
        "devices": devices,
        "token_cache_hits": full.token_cache_hits,
        "result_cache_hits": full.result_cache_hits,
        "latency_samples": len(latencies),
        "model": config.model,
        "model_version": engine.model_version,
    }


async def _watch(engine: Engine, texts: int, progress: Progress) -> None:
    """Tells how many of the texts are done, until cancelled."""
    while True:
        stats = engine.stats()
        done = stats.texts_computed + stats.texts_coalesced + stats.result_cache_hits
        progress("throughput, all texts at once", min(1.0, done / texts))
        await asyncio.sleep(_PROGRESS_S)


async def _open_loop(
    ask: Callable[[list[str]], Awaitable[Any]], texts: Sequence[str], rate: float, seconds: float, progress: Progress
) -> tuple[list[float], int]:
    """Sends single texts, `rate` a second, for `seconds`, and waits as long again for the last answers.

    Returns the latencies in seconds, ascending, and how many of them are of texts without an answer: the time that
    those waited.
    """
    chance = random.Random(_SEED)
    latencies: list[float] = []
    waiting: dict[int, float] = {}  # since when

    async def one(number: int, text: str) -> None:
        while True:
            try:
                await ask([text])
                break
            except Backpressure as full:
                await asyncio.sleep(full.retry_after_s)
        # From when it was due, not from when it was sent: a late sender hides what it is late by.
        latencies.append(time.perf_counter() - waiting.pop(number))

    begun = due = time.perf_counter()
    told = 0.0
    with contextlib.suppress(TimeoutError), _first_error():
        async with asyncio.timeout(None) as patience, asyncio.TaskGroup() as group:
            while (due := due + chance.expovariate(rate)) < begun + seconds and len(waiting) < _UNANSWERED_MAX:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                number = len(latencies) + len(waiting)
                waiting[number] = due
                group.create_task(one(number, chance.choice(texts)))
                if due - told >= _PROGRESS_S:
                    told = due
                    progress("latency of single texts", (due - begun) / seconds)
            patience.reschedule(asyncio.get_running_loop().time() + seconds)
    now = time.perf_counter()
    return sorted([*latencies, *(now - since for since in waiting.values())]), len(waiting)


@contextlib.contextmanager
def _first_error() -> Iterator[None]:
    """Raises the first of a group of errors, as it is: it says what to do."""
    try:
        yield
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which that share of an ascending sequence lies; 0 for an empty one."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def _telemetry() -> Telemetry:
    return Telemetry("engine", TelemetryConfig(log_level="warning"))
