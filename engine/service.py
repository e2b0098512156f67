"""The engine as gateway and central use it: one or several models, each replaceable while it works.

```python
engine = Engine(config, telemetry)
await engine.start()
for analysis in await engine.analyze(["disk full"], stream="syslog"):
    print(analysis.label, analysis.score)
async for piece in engine.generator.generate("The disk is full because"):  # with engine.generation.model
    print(piece, end="")
await engine.swap("default", "/models/next")  # no request is dropped
await engine.drain(5.0)
```

Threads: the event loop keeps the books (`session`, `flights`), one host thread prepares texts and reads results for all
models, online first (`turns`), and each model's compute threads drive its devices (`runner`). Work is bounded by tokens
and calls waiting: beyond that `analyze` raises Backpressure before the call cost anything. A call with more texts than
`engine.chunk_texts` or `chunk_chars` is fed piece by piece, so that its size does not matter to others.

Several models: `engine.model` is the default one, `engine.models` adds others by name. A call says which one it means;
when it does not, the default one serves it if it offers the task, else the first other one that does. Each has a queue,
caches and devices of its own.

Fails: a bad text, an expired one, or one that the device cannot compute has an `error` in its own Analysis. `analyze`
raises only for what concerns the whole call: Backpressure (full), Permanent (unknown task or model), Retryable
(draining, or the compute thread died).
"""

import asyncio
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from engine.analysis import Analysis, failures
from engine.config import DEFAULT_NAME, GENERATION_NAME, EngineConfig
from engine.failures import EngineStopped
from engine.fleet import DeviceStats
from engine.generation import Generator
from engine.generation_served import ServedGenerator
from engine.lane import Priority
from engine.loading import load
from engine.served import Listener, Load, ServedModel, files_version
from engine.stats import (
    CACHE_DAMAGED,
    FAILED,
    LOADED,
    REFUSED,
    SWAPPED,
    EngineCounters,
    EngineStats,
    Figures,
    LiveMetrics,
)
from engine.turns import Turns
from sluice.errors import Backpressure, Permanent, Retryable
from sluice.telemetry import Telemetry

__all__ = ["Analysis", "Engine", "EngineStats", "Priority"]


class Engine:
    """See the module's docstring.

    Args:
        config: the engine's section.
        telemetry: of the process; one engine per Telemetry, since metrics are registered once.
        loader: opens a model; tests pass one with a backend of theirs.

    Attributes:
        opened: set when all models could be called for the first time.
    """

    def __init__(self, config: EngineConfig, telemetry: Telemetry, loader: Load = load) -> None:
        self._config = config
        self._telemetry = telemetry
        self._load = loader
        self._counters = EngineCounters(telemetry)
        self._host = ThreadPoolExecutor(1, thread_name_prefix="engine-host")
        self._turns = Turns(config)
        self._models: dict[str, ServedModel] = {}
        self._alive: set[ServedModel] = set()  # those above, and those that are opened or retired
        self._generation = ServedGenerator(telemetry)
        self._swapping = asyncio.Lock()
        self._listener = Listener(self._counters.batch, self._damaged, self._failed, self._counters.device)
        self._past = Figures()  # of models that are gone
        self._closed = ""
        self.opened = asyncio.Event()
        telemetry.registry.register(LiveMetrics(self._figures, self._devices))

    @property
    def model(self) -> str:
        """The default model, as configured."""
        served = self._models.get(DEFAULT_NAME)
        return served.config.model if served else self._config.model

    @property
    def model_version(self) -> str:
        """Of the default model: changes with anything that changes results; empty before `start`."""
        return self._version(DEFAULT_NAME)

    @property
    def models(self) -> dict[str, str]:
        """Versions by name of all models that are open."""
        return {name: served.version for name, served in self._models.items() if served.is_open}

    @property
    def embedding_width(self) -> int:
        """Numbers in an embedding of the default model; 0 before `start`."""
        served = self._models.get(DEFAULT_NAME)
        return served.embedding_width if served else 0

    @property
    def ready(self) -> bool:
        """Whether every model can be called and has a device to run on."""
        generator = self._generation.current
        generates = generator.ready if generator else not self._config.generation.model
        return bool(self._models) and generates and all(served.ready for served in self._models.values())

    @property
    def generator(self) -> Generator:
        """Text generation, with the model `engine.generation.model`. Ask for it anew for each request: it may change.

        Raises:
            Permanent: none is configured.
            Retryable: the engine is not running.
        """
        if self._generation.current is not None:
            return self._generation.current
        if self._closed or not self.opened.is_set():
            raise Retryable(self._closed or "the engine is not started")
        raise Permanent("no model that generates text is configured: set engine.generation.model")

    async def start(self) -> None:
        """Loads all models, warms them up and fits their cost models; ready afterwards.

        Raises:
            Permanent: a model is not there or damaged.
            ConfigError: device or labels are wrong.
        """
        async with self._swapping:
            assert not self._models, "start is called once"
            for name in self._config.names:
                if self._closed:
                    return
                # One after another: they are measured while they load, and must not disturb each other.
                served = self._models[name] = self._served(name, self._config.of(name))
                try:
                    await served.open()
                except EngineStopped:
                    return  # drained while it was loaded: nobody calls it any more
                self._say_loaded(served)
            try:
                await self._replace_generator(self._config)
            except EngineStopped:
                return
            self._say_ready()

    def plan(self, model: str = DEFAULT_NAME) -> dict[str, str]:
        """What was chosen for a model at start-up, each with its reason; `generation`: for the one that makes text."""
        if model == GENERATION_NAME:
            return self._generation.current.plan() if self._generation.current else {}
        served = self._models.get(model)
        return served.plan() if served else {}

    def tasks(self, model: str = DEFAULT_NAME) -> frozenset[str]:
        """The tasks that a model offers; none while it is not there."""
        served = self._models.get(model)
        return served.tasks if served else frozenset()

    async def analyze(
        self,
        texts: Sequence[str],
        *,
        task: str = "classify",
        stream: str = "",
        priority: Priority = Priority.BACKGROUND,
        deadline_s: float | None = None,
        embed: bool = False,
        model: str = "",
    ) -> list[Analysis]:
        """Analyses texts; one result each, in order. Cancelling it drops what still waits.

        Args:
            texts: any texts; a bad one gets an error of its own.
            task: one that a model offers: `classify`, `embed`, `novelty`, `tokens`.
            stream: whose texts they are; novelty is kept per stream.
            priority: ONLINE goes first.
            deadline_s: seconds from now; what is not there by then has an error.
            embed: whether embeddings are wanted (the task `embed` always gives them).
            model: the name of one of the configured models; empty: see the module's docstring.

        Raises:
            Backpressure: too many tokens or calls wait.
            Permanent: no such model, or no such task with it, or a deadline that is no number.
            Retryable: the engine is not running.
        """
        if deadline_s is not None and math.isnan(deadline_s):
            raise Permanent("deadline_s must be a number")
        served = self._find(model, task)
        begun_s = time.monotonic()
        with served.used() as session:
            reading = session.reading(task, stream, embed=embed)
            try:
                outcomes = await session.compute(texts, stream, priority, deadline_s)
            except Backpressure:
                self._telemetry.emit(REFUSED)
                raise
            analyses = await session.read(reading, outcomes, texts, priority)
        self._counters.caches(session.cache_changes())
        for reason, count in failures(outcomes).items():
            self._counters.failed(reason, count)
        self._counters.call(task, priority.name.lower(), analyses, time.monotonic() - begun_s)
        return analyses

    async def swap(self, name: str, model: str) -> str:
        """Replaces a model while it works; returns the new version.

        The next one is loaded and measured beside the old one, then takes all new calls; the calls under way end on
        the old one, which is closed afterwards. For that time both are in memory. When the next one cannot be
        loaded, the old one stays in place.

        Args:
            name: of the model that is replaced; `generation` for the one that generates text.
            model: a package, a folder or a hub id.

        Raises:
            Permanent: there is no model of that name, or the next one is not there, damaged, or does not offer the
                tasks of the old one.
        """
        async with self._swapping:
            self._require_open()
            if name == GENERATION_NAME and self._generation.current is not None:
                return await self._replace_generator(self._generation.config.with_model(GENERATION_NAME, model))
            served = self._models.get(name)
            if served is None:
                raise Permanent(f"there is no model '{name}'; there are {', '.join(self._models)}")
            return await self._replace(name, served.config.with_model(DEFAULT_NAME, model))

    async def reload(self, config: EngineConfig) -> list[str]:
        """Takes over a changed section: replaces the models that are configured otherwise now, opens and closes others.

        A model whose files have changed, or whose compute thread died, is replaced too. Returns the names that changed.

        Raises:
            Permanent: a model cannot be loaded or take over; those before it in the section were taken over.
        """
        async with self._swapping:
            self._require_open()
            changed = []
            for name in config.names:
                if await self._is_other(self._models.get(name), config.of(name)):
                    await self._replace(name, config.of(name))
                    changed.append(name)
                self._models[name].config = config.of(name)  # what it does not read may be new, and counts in a swap
            for name in [name for name in self._models if name not in config.names]:
                await self._retire(self._models.pop(name))
                changed.append(name)
            if await self._generation.is_other(config):
                await self._replace_generator(config)
                changed.append(GENERATION_NAME)
            self._config = self._turns.config = config
            self._say_ready()
            return changed

    async def _is_other(self, served: ServedModel | None, config: EngineConfig) -> bool:
        """Whether a model must be opened anew to be as `config` has it."""
        if served is None or served.refusing or not served.is_as(config):
            return True
        if self._load is not load:
            return False
        version = await asyncio.to_thread(files_version, config)
        return bool(version) and version != served.files_version

    async def _replace(self, name: str, config: EngineConfig) -> str:
        """Opens a model as `config` has it for this one, in the place of the one that has its name now, if any."""
        self._require_open()  # it may have been closed while the one before was replaced
        old = self._models.get(name)
        new = self._served(name, config)
        try:
            await new.open(old)
            self._require_open()  # it may have been closed while this one was loaded
            if old is not None:
                _require_tasks(old, new)
        except BaseException:
            new.release_streams()
            await new.close("it was not taken into use")
            self._alive.discard(new)
            raise
        self._models[name] = new
        self._say_loaded(new)
        self._telemetry.emit(SWAPPED, model=name, version=new.version, before=old.version if old else "")
        if old is not None:
            old.release_streams()  # it would save streams that are skipped now
            await self._retire(old)
            await new.keep_streams()
        return new.version

    async def _replace_generator(self, config: EngineConfig) -> str:
        """Opens the model that generates text as `config` has it; returns its version, or nothing when it has none."""
        old = await self._generation.open(config)
        new = self._generation.current
        version = new.model_version if new else ""
        if new is not None:
            self._telemetry.emit(LOADED, model=new.model, version=version, plan=new.plan())
        if old is not None:
            self._telemetry.emit(SWAPPED, model=GENERATION_NAME, version=version, before=old.model_version)
            await self._generation.retire(old, self._config.swap_drain_s)
        return version

    async def _retire(self, old: ServedModel) -> None:
        await old.retire(self._config.swap_drain_s, "the model was replaced")
        self._alive.discard(old)
        self._past += replace(old.figures, queue_tokens=0)

    def _require_open(self) -> None:
        if self._closed or not self._models:
            raise Permanent(self._closed or "the engine is not started")

    def stats(self) -> EngineStats:
        """All figures since the start, over all models."""
        devices = tuple(device for served in self._models.values() for device in served.devices)
        return self._counters.snapshot(self._figures(), devices)

    async def drain(self, deadline_s: float) -> None:
        """Refuses new calls, lets those under way end within `deadline_s` seconds, and closes."""
        await self._end(deadline_s, "the engine is draining")

    async def close(self) -> None:
        """Stops at once; calls under way get errors. Idempotent, and allowed before `start`."""
        await self._end(0.0, "the engine is closed")

    async def _end(self, deadline_s: float, why: str) -> None:
        self._closed = self._closed or why
        everything = tuple(self._alive)
        for served in everything:
            served.refusing = served.refusing or why
        retiring = (served.retire(deadline_s, why) for served in everything)
        await asyncio.gather(self._generation.close(deadline_s, why), *retiring)
        self._host.shutdown(wait=True)

    def _find(self, model: str, task: str) -> ServedModel:
        if self._closed or not self._models:
            raise Retryable(self._closed or "the engine is not started")
        if model:
            served = self._models.get(model)
            if served is None:
                raise Permanent(f"there is no model '{model}'; there are {', '.join(self._models)}")
            return served
        default = self._models[DEFAULT_NAME]
        return next((served for served in (default, *self._models.values()) if task in served.tasks), default)

    def _version(self, name: str) -> str:
        served = self._models.get(name)
        return served.version if served else ""

    def _served(self, name: str, config: EngineConfig) -> ServedModel:
        served = ServedModel(config, self._load, self._host, self._turns, self._listener, name)
        self._alive.add(served)
        return served

    def _figures(self) -> Figures:
        return sum((served.figures for served in tuple(self._alive)), self._past)

    def _devices(self) -> dict[str, tuple[DeviceStats, ...]]:
        return {name: served.devices for name, served in list(self._models.items())}

    def _damaged(self, what: str) -> None:
        self._telemetry.emit(CACHE_DAMAGED, detail=what)

    def _failed(self, error: Exception) -> None:
        self._telemetry.emit(FAILED, detail=repr(error))

    def _say_ready(self) -> None:
        if self.ready:
            self.opened.set()

    def _say_loaded(self, served: ServedModel) -> None:
        self._counters.opened(served.name, served.devices)
        self._telemetry.emit(LOADED, model=served.config.model, version=served.version, plan=served.plan())


def _require_tasks(old: ServedModel, new: ServedModel) -> None:
    missing = sorted(old.tasks - new.tasks)
    if missing:
        raise Permanent(f"model '{new.config.model}' cannot take over: it does not offer {', '.join(missing)}")
