"""The engine as gateway and central use it.

```python
engine = Engine(config, telemetry)
await engine.start()
for analysis in await engine.analyze(["disk full"], stream="syslog"):
    print(analysis.label, analysis.score)
await engine.drain(5.0)
```

Threads: the event loop keeps the books (`session`, `flights`), one host thread prepares texts and reads
results, one compute thread drives the device (`runner`). Work is bounded by tokens waiting: beyond that
`analyze` raises Backpressure, and nothing of the call was queued. A call with more texts than
`engine.chunk_texts` is fed piece by piece, so that its size does not matter to others.

Fails: a bad text, an expired one, or one that the device cannot compute has an `error` in its own Analysis.
`analyze` raises only for what concerns the whole call: Backpressure (full), Permanent (unknown task),
Retryable (draining, or the compute thread died).
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Final

from engine.analysis import Analysis, failures
from engine.config import EngineConfig
from engine.lane import Priority
from engine.loading import Loaded, load
from engine.runner import Report, Runner
from engine.session import Session
from engine.stats import CACHE_DAMAGED, LOADED, REFUSED, EngineCounters, EngineStats
from sluice.errors import Backpressure, Retryable
from sluice.telemetry import Event, Telemetry

__all__ = ["Analysis", "Engine", "EngineStats", "Priority"]

FAILED: Final = Event(name="engine_failed", unit="engines", help="Engines whose compute thread died.", level="error")


class Engine:
    """One model on one device.

    Args:
        config: the engine's section.
        telemetry: of the process; one engine per Telemetry, since metrics are registered once.
        loader: opens the model; tests pass one with a backend of theirs.
    """

    def __init__(
        self, config: EngineConfig, telemetry: Telemetry, loader: Callable[[EngineConfig], Loaded] = load
    ) -> None:
        self._config = config
        self._telemetry = telemetry
        self._load = loader
        self._counters = EngineCounters(telemetry)
        self._host = ThreadPoolExecutor(1, thread_name_prefix="engine-host")
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: Session | None = None
        self._refusing = "the engine is not started"
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    @property
    def model(self) -> str:
        """The model's name, as configured."""
        return self._config.model

    @property
    def model_version(self) -> str:
        """Changes with anything that changes results; empty before `start`."""
        return self._session.loaded.version if self._session else ""

    @property
    def embedding_width(self) -> int:
        """Numbers in an embedding; 0 before `start`."""
        return self._session.loaded.backend.info.embedding_width if self._session else 0

    @property
    def ready(self) -> bool:
        """Whether `analyze` can be called."""
        return not self._refusing

    async def start(self) -> None:
        """Loads the model, warms it up and fits the cost model; ready afterwards.

        Raises:
            Permanent: the model is not there or damaged.
            ConfigError: device or labels are wrong.
        """
        assert self._thread is None, "start is called once"
        if self._closed:
            return
        self._loop = asyncio.get_running_loop()
        started: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._compute, args=(started,), name="engine-compute", daemon=True)
        self._thread.start()
        await started
        self._telemetry.emit(LOADED, model=self.model, version=self.model_version, plan=self.plan())

    def plan(self) -> dict[str, str]:
        """What was chosen at start-up, each with its reason."""
        return dict(self._session.loaded.reasons) if self._session else {}

    async def analyze(
        self,
        texts: Sequence[str],
        *,
        task: str = "classify",
        stream: str = "",
        priority: Priority = Priority.BACKGROUND,
        deadline_s: float | None = None,
        embed: bool = False,
    ) -> list[Analysis]:
        """Analyses texts; one result each, in order. Cancelling it drops what still waits.

        Args:
            texts: any texts; a bad one gets an error of its own.
            task: `classify`, `embed` or `novelty`.
            stream: whose texts they are; novelty is kept per stream.
            priority: ONLINE goes first.
            deadline_s: seconds from now; what is not there by then has an error.
            embed: whether embeddings are wanted (the task `embed` always gives them).

        Raises:
            Backpressure: too many tokens wait.
            Permanent: no such task with this model.
            Retryable: the engine is not running.
        """
        session = self._session
        if self._refusing or session is None:
            raise Retryable(self._refusing)
        begun_s = time.monotonic()
        reading = session.reading(task, stream, embed=embed)
        with self._counted_call():
            try:
                outcomes = await session.compute(texts, stream, priority, deadline_s)
            except Backpressure:
                self._telemetry.emit(REFUSED)
                raise
            analyses = await session.read(reading, outcomes)
        self._counters.caches(session.cache_counts)
        for reason, count in failures(outcomes).items():
            self._counters.failed(reason, count)
        self._counters.call(task, priority.name.lower(), analyses, time.monotonic() - begun_s)
        return analyses

    def stats(self) -> EngineStats:
        """All figures since the start."""
        if self._session is None:
            return self._counters.snapshot(0, 0.0, 0)
        runner = self._session.runner
        return self._counters.snapshot(runner.queued_tokens, runner.busy_s, self._session.flights.coalesced)

    async def drain(self, deadline_s: float) -> None:
        """Refuses new calls, lets those under way end within `deadline_s` seconds, and closes."""
        self._refusing = self._refusing or "the engine is draining"
        with suppress(TimeoutError):  # what is left gets an error from close
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()
        await self.close()

    async def close(self) -> None:
        """Stops at once; calls under way get errors. Idempotent, and allowed before `start`."""
        self._refusing = self._refusing or "the engine is closed"
        if self._closed:
            return
        self._closed = True
        if self._session is not None:
            self._session.runner.stop()
        if self._thread is not None:
            # A batch or a load that is under way is waited for: a thread cannot be interrupted.
            await asyncio.to_thread(self._thread.join)
        if self._session is not None:
            self._session.flights.fail(Retryable("the engine stopped"))
            await self._idle.wait()
            await self._session.close()
        self._host.shutdown(wait=True)

    def _compute(self, started: "asyncio.Future[None]") -> None:
        """The compute thread: loads, then runs until stopped."""
        try:
            loaded = self._load(self._config)
        except BaseException as error:  # noqa: BLE001 - it is raised again where `start` waits
            self._post(self._not_opened, started, error)
            return
        try:
            runner = Runner(
                loaded.backend,
                loaded.scheduler,
                loaded.costs,
                loaded.admission,
                lambda report: self._post(self._settle, report),
            )
            self._post(self._opened, started, loaded, runner)
            runner.run()
        except Exception as error:  # noqa: BLE001 - whoever waits must be told, whatever it was
            self._post(self._broken, error)
        finally:
            loaded.backend.close()

    def _opened(self, started: "asyncio.Future[None]", loaded: Loaded, runner: Runner) -> None:
        if self._closed or started.done():
            runner.stop()
            return
        self._session = Session(self._config, loaded, runner, self._host, time.monotonic, self._damaged)
        self._refusing = ""
        started.set_result(None)

    def _not_opened(self, started: "asyncio.Future[None]", error: BaseException) -> None:
        if not started.done():
            started.set_exception(error)

    def _broken(self, error: Exception) -> None:
        self._refusing = f"the engine's compute thread died: {error!r}"
        self._telemetry.emit(FAILED, detail=repr(error))
        if self._session is not None:
            self._session.flights.fail(Retryable(self._refusing))

    def _settle(self, report: Report) -> None:
        if self._session is not None:
            self._session.settle(report)
            self._counters.batch(report, self._session.runner.queued_tokens)

    def _damaged(self, what: str) -> None:
        self._telemetry.emit(CACHE_DAMAGED, detail=what)

    @contextmanager
    def _counted_call(self) -> Iterator[None]:
        self._calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        """Calls a function on the event loop's thread."""
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *arguments)
