"""One model from loading to closing: its compute thread, its session, and who still uses it.

The engine holds one of these per model and, while a model is replaced, the old one beside the new one. Everything here
lives on the event loop's thread; the compute thread loads the model, drives its device and posts what it has to say.

States: opening -> serving -> retiring (takes no new call, those under way go on) -> closed; or broken, when the compute
thread died: every call gets that error until the model is replaced. While all of its devices are gone for too long it
serves, but is not ready: the runner refuses calls until one is back.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import msgspec

from engine.config import EngineConfig
from engine.failures import EngineStopped
from engine.fleet import DeviceEvent, DeviceStats, Recovery
from engine.loading import Loaded
from engine.model_place import NotFound, locate
from engine.models import read_card
from engine.novelty import Novelty
from engine.runner import Report, Runner
from engine.session import Session
from engine.stats import Figures
from engine.tasks import ZeroShotClassifier
from engine.turns import Turns
from sluice.errors import Retryable, SluiceError

Load = Callable[[EngineConfig], Loaded]


@dataclass(frozen=True, slots=True)
class Listener:
    """Whom a served model tells, on the event loop's thread.

    Attributes:
        batch: of the model of this name: it is done.
        damaged: a cache is damaged; what.
        failed: the compute thread died; why.
        device: something happened to a device.
    """

    batch: Callable[[str, Report], None]
    damaged: Callable[[str], None]
    failed: Callable[[Exception], None]
    device: Callable[[DeviceEvent], None]


def files_version(config: EngineConfig) -> str:
    """Of the model's files as they are now; empty when they cannot be read."""
    with suppress(SluiceError):
        return read_card(config.model, locate(config.model, allow_download=False)).version
    return ""


class ServedModel:
    """See the module's docstring.

    Args:
        config: the engine's section, as it holds for this model.
        load: opens the model, on the compute thread.
        host: the thread that prepares texts and reads results; shared by all models of an engine.
        turns: whose turn it is there.
        listener: told what happens.
        name: what it is called beside other models.
    """

    def __init__(
        self, config: EngineConfig, load: Load, host: ThreadPoolExecutor, turns: Turns, listener: Listener, name: str
    ) -> None:
        self.config = config
        self.name = name
        self.refusing = "the engine is not started: its model is still being loaded; try again"
        self._load = load
        self._host = host
        self._turns = turns
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._compute, name=f"engine-{config.model[:32]}", daemon=True)
        self._session: Session | None = None
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False
        self._closing: asyncio.Task[None] | None = None
        self._known: Novelty | None = None
        self._down = False

    async def open(self, before: "ServedModel | None" = None) -> None:
        """Loads, measures and warms up; ready afterwards.

        Args:
            before: the model that this one replaces: what it knows of streams is taken over, where that fits.

        Raises:
            Permanent: the model is not there or damaged.
            ConfigError: device or labels are wrong.
        """
        self._known = before.novelty if before else None
        self._thread.start()
        await self._started

    def is_as(self, config: EngineConfig) -> bool:
        """Whether it would be the same if it were opened as `config` has it: who needs no labels has any."""
        if self._session is not None and not isinstance(self._session.loaded.tasks.get("classify"), ZeroShotClassifier):
            config = msgspec.structs.replace(config, labels=self.config.labels)
        return self.config == config

    @property
    def version(self) -> str:
        """Changes with anything that changes results; empty before it is open."""
        return self._session.loaded.version if self._session else ""

    @property
    def is_open(self) -> bool:
        """Whether a session is there."""
        return self._session is not None

    @property
    def ready(self) -> bool:
        """Whether it can be called and has a device to run on."""
        return not self.refusing and not self._down

    @property
    def session(self) -> Session:
        """The session.

        Raises:
            Retryable: it is not open, closed, or its compute thread died.
        """
        if self.refusing or self._session is None:
            raise Retryable(self.refusing or "the engine is not started")
        return self._session

    @property
    def novelty(self) -> Novelty | None:
        """What streams usually say; None before it is open, and when it is off."""
        return self._session.novelty if self._session else None

    @property
    def tasks(self) -> frozenset[str]:
        """What it offers; empty before it is open."""
        return frozenset(self._session.loaded.tasks) if self._session else frozenset()

    @property
    def embedding_width(self) -> int:
        """Numbers in an embedding; 0 before it is open."""
        return self._session.loaded.info.embedding_width if self._session else 0

    @property
    def files_version(self) -> str:
        """Of the model's files when they were read; empty before it is open."""
        return self._session.loaded.card.version if self._session else ""

    @property
    def figures(self) -> Figures:
        """What it is doing now, and did so far; zeros before it is open."""
        if self._session is None:
            return Figures()
        runner = self._session.runner
        return Figures(runner.queued_tokens, runner.busy_s, self._session.flights.coalesced)

    @property
    def devices(self) -> tuple[DeviceStats, ...]:
        """Figures of its devices; none before it is open."""
        return self._session.runner.devices() if self._session else ()

    def plan(self) -> dict[str, str]:
        """What was chosen at start-up, each with its reason."""
        return dict(self._session.loaded.reasons) if self._session else {}

    @contextmanager
    def used(self) -> Iterator[Session]:
        """The session, for one call: it is not closed by `retire` before the call has ended."""
        session = self.session
        self._calls += 1
        self._idle.clear()
        try:
            yield session
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    def release_streams(self) -> None:
        """Another model saves what streams usually say from now on."""
        if self._session is not None:
            self._session.release_streams()

    async def keep_streams(self) -> None:
        """Saves what streams usually say, where that is not done yet. The model before, if any, is closed."""
        if self._session is not None:
            await self._session.keep_streams(alone=True)

    async def retire(self, deadline_s: float, why: str) -> None:
        """Refuses new calls, lets those under way end within `deadline_s` seconds, and closes."""
        self.refusing = self.refusing or why
        with suppress(TimeoutError):  # what is left gets an error from close
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()
        await self.close(why)

    async def close(self, why: str) -> None:
        """Stops at once; calls under way get errors. Idempotent, also for several at once; allowed before `open`."""
        self.refusing = self.refusing or why
        self._closed = True
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if self._session is not None:
            self._session.runner.stop()
        if self._thread.ident is not None:
            # A batch or a load that is under way is waited for: a thread cannot be interrupted.
            await asyncio.to_thread(self._thread.join)
        if self._session is not None:
            self._session.flights.fail(EngineStopped("the engine stopped"))
            await self._idle.wait()
            await self._session.close()

    def _compute(self) -> None:
        """The compute thread: loads, then runs until stopped."""
        try:
            loaded = self._load(self.config)
        except BaseException as error:  # noqa: BLE001 - it is raised again where `open` waits
            self._post(self._not_opened, error.of(self.name) if isinstance(error, NotFound) else error)
            return
        try:
            runner = Runner(
                loaded.devices,
                loaded.scheduler,
                lambda report: self._post(self._settle, report),
                on_event=lambda event: self._post(self._happened, event),
                recovery=Recovery.of(self.config),
            )
            self._post(self._opened, loaded, runner)
            runner.run()
        except Exception as error:  # noqa: BLE001 - whoever waits must be told, whatever it was
            self._post(self._broken, error)
        finally:
            loaded.close()

    def _opened(self, loaded: Loaded, runner: Runner) -> None:
        if self._closed or self._started.done():
            runner.stop()
            self._not_opened(EngineStopped(self.refusing))
            return
        try:
            known, self._known = self._known, None
            damaged = self._listener.damaged
            host, turns = self._host, self._turns
            self._session = Session(self.config, loaded, runner, host, turns, time.monotonic, damaged, known)
        except Exception as error:  # noqa: BLE001 - it is raised again where `open` waits
            runner.stop()
            self._not_opened(error)
            return
        self.refusing = ""
        self._started.set_result(None)

    def _not_opened(self, error: BaseException) -> None:
        self.refusing = self.refusing or "the model could not be loaded"
        if not self._started.done():
            self._started.set_exception(error)

    def _broken(self, error: Exception) -> None:
        self.refusing = f"the engine's compute thread died: {error!r}"
        self._listener.failed(error)
        if self._session is not None:
            self._session.flights.fail(EngineStopped(self.refusing))

    def _happened(self, event: DeviceEvent) -> None:
        if event.kind in {"down", "up"}:
            self._down = event.kind == "down"
        self._listener.device(event)

    def _settle(self, report: Report) -> None:
        if self._session is not None:
            self._session.settle(report)
            self._listener.batch(self.name, report)

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        """Calls a function on the event loop's thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *arguments)
