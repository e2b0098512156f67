"""One loaded model at work: from texts to outcomes. Several may live side by side; `service` holds the one in use.

Threads: this object lives on the event loop; `host` is the one thread that prepares texts and reads
results; the runner's thread drives the device and reports through `settle`.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import partial
from typing import TypeVar

from engine.analysis import Analysis, Reading
from engine.config import EngineConfig
from engine.cpus import usable_cpus
from engine.failures import BadText, DeadlinePassed
from engine.flights import NO_DEADLINE, Call, Flights
from engine.lane import Priority
from engine.loading import Loaded, vocabulary_of
from engine.novelty import Novelty
from engine.novelty_file import NoveltyFile
from engine.prepare import CacheCounts, Prepared, Preparer
from engine.results import Output
from engine.runner import Report, Runner
from engine.tasks import find
from engine.token_pool import processes_for, reason_for
from engine.turns import Turns

_T = TypeVar("_T")


class Session:
    """See the module's docstring.

    Args:
        config: the engine's section.
        loaded: the model.
        runner: driving its backend.
        host: an executor with one thread.
        turns: whose turn it is there.
        clock: the runner's.
        on_damage: told, on the event loop's thread or another one, when a cache is damaged.
        known: what streams usually say, as the model knows it that this one replaces: known to both from then on, when
            vectors mean the same in both.

    Attributes:
        novelty: what streams usually say; None when it is off.
    """

    def __init__(
        self,
        config: EngineConfig,
        loaded: Loaded,
        runner: Runner,
        host: ThreadPoolExecutor,
        turns: Turns,
        clock: Callable[[], float],
        on_damage: Callable[[str], None],
        known: Novelty | None = None,
    ) -> None:
        self.loaded = loaded
        self.runner = runner
        self.flights = Flights(runner, config.calls_in_line_max, config.queue_tokens_max)
        self._config = config
        self._host = host
        self._turns = turns
        self._clock = clock
        self._on_damage = on_damage
        processes = processes_for(config.tokenizer_processes, loaded.info.device, usable_cpus().count)
        loaded.reasons["tokenizer"] = reason_for(processes, config.tokenizer_processes)
        self._preparer = Preparer(
            loaded.tokenizer,
            loaded.output_version.encode(),
            config.text_bytes_max,
            config.caches,
            on_damage,
            processes,
            vocabulary_of(loaded.card),
        )
        self._width = loaded.info.embedding_width
        self.novelty: Novelty | None = None
        self._novelty_file: NoveltyFile | None = None
        self._saving: asyncio.Task[None] | None = None
        if config.novelty.enabled and self._width:
            self._know_streams(known)
        self._remembering: set[asyncio.Future[None]] = set()
        self._counted = CacheCounts()

    def cache_changes(self) -> CacheCounts:
        """Hits and misses since the last time."""
        now, before = self._preparer.counts, self._counted
        self._counted = replace(now)
        changes = (getattr(now, each.name) - getattr(before, each.name) for each in fields(CacheCounts))
        return CacheCounts(*changes)

    def reading(self, task: str, stream: str, *, embed: bool) -> Reading:
        """How a call's outcomes will be read.

        Raises:
            Permanent: no such task with this model.
        """
        return Reading(
            task=find(self.loaded.tasks, task, self.loaded.card.name),
            width=self._width,
            embed=embed or task == "embed",
            novelty=self.novelty,
            novelty_is_score=task == "novelty",
            stream=stream,
            model=self.loaded.card.name,
            model_version=self.loaded.version,
        )

    async def compute(
        self, texts: Sequence[str], stream: str, priority: Priority, deadline_s: float | None
    ) -> list[Output | Exception | None]:
        """An outcome for each text. Cancelling it drops what still waits.

        Raises:
            Backpressure: too many tokens or calls wait.
            Retryable: the runner is stopping.
        """
        call = Call(len(texts))
        until_s = NO_DEADLINE if deadline_s is None else self._clock() + deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                await self._feed(call, texts, stream, priority, until_s)
                await call.wait()
        except TimeoutError:
            late = DeadlinePassed(f"its deadline of {deadline_s} s passed")
            for position in range(len(texts)):
                call.deliver(position, late)
        finally:
            self.flights.leave(call)
        return call.outcomes

    async def read(
        self,
        reading: Reading,
        outcomes: Sequence[Output | Exception | None],
        texts: Sequence[str],
        priority: Priority,
    ) -> list[Analysis]:
        """Reads the outcomes of a call's texts on the host thread, chunk by chunk: others get their turn between."""
        analyses: list[Analysis] = []
        for part in self._chunks(texts):
            analyses += await self._on_host(priority, reading.read, outcomes[part], texts[part])
        if self._novelty_file is not None and self._novelty_file.due and (self._saving is None or self._saving.done()):
            self._saving = asyncio.create_task(self._save(self._novelty_file))
        return analyses

    def release_streams(self) -> None:
        """Another session saves what streams usually say from now on."""
        self._novelty_file = None

    async def keep_streams(self, *, alone: bool = False) -> None:
        """Saves what streams usually say, where that is not done yet.

        Args:
            alone: nobody else writes to the file any more, but somebody may have written streams that are skipped now.
        """
        if alone and self._novelty_file is not None and self._config.caches.skip_streams:
            self._novelty_file.outdate()
        while self._saving is not None and not self._saving.done():
            await asyncio.wait({self._saving})
        if self._novelty_file is not None and self._novelty_file.changed:
            self._saving = asyncio.create_task(self._save(self._novelty_file))
            await asyncio.wait({self._saving})

    def settle(self, report: Report) -> None:
        """A batch is done: on the event loop's thread."""
        fresh = self.flights.settle(report, self._clock())
        if fresh and len(self._remembering) < self._config.caches.remember_batches_max:
            future = asyncio.ensure_future(self._on_host(Priority.BACKGROUND, self._preparer.remember, fresh))
            self._remembering.add(future)
            future.add_done_callback(self._remembered)

    async def close(self) -> None:
        """Saves what streams usually say, and closes the caches after what is being remembered.

        The runner has ended before.
        """
        await self.keep_streams()
        if self._remembering:
            await asyncio.wait(self._remembering)
        await self._on_host(Priority.BACKGROUND, self._preparer.close)

    async def _feed(self, call: Call, texts: Sequence[str], stream: str, priority: Priority, until_s: float) -> None:
        """Prepares the texts chunk by chunk and puts them under way, waiting for room between chunks.

        Whether there is room for anything decides whether the call is accepted, before its texts cost anything. Judged
        by its size, a large call would be refused for ever beside many small ones.
        """
        cache = self._preparer.caches(stream)
        self.flights.admit(priority)
        for part in self._chunks(texts):
            prepared = await self._prepare(texts[part], stream, priority, new=part.start == 0)
            wanted = _deliver_known(call, part.start, prepared)
            if wanted:
                await self.flights.board(
                    call, wanted, clock=self._clock, priority=priority, deadline_s=until_s, cache=cache
                )

    async def _prepare(self, texts: Sequence[str], stream: str, priority: Priority, *, new: bool) -> list[Prepared]:
        """Prepares a chunk; that of a new call only if there is still room when it is its turn."""

        def start() -> asyncio.Future[list[Prepared]]:
            if new:
                self.flights.admit(priority)
            return self._begin(self._preparer.prepare, texts, stream)

        return await self._turns.run(priority, start, new=new)

    def _know_streams(self, known: Novelty | None) -> None:
        """What streams usually say: as the model before knows it, or as it was saved; else nothing yet."""
        config, made = self._config, (self._config.novelty, self._width, self.loaded.output_version)
        shared = known if known is not None and known.fits(*made) else None
        self.novelty = Novelty(*made) if shared is None else shared
        if config.caches.directory:
            self._novelty_file = NoveltyFile(config.caches, self.novelty, self._on_damage)
            if shared is None:
                # The host thread does it before it reads the first result.
                self._host.submit(self._novelty_file.load, write=known is None)
            else:
                self._novelty_file.outdate()

    async def _save(self, file: NoveltyFile) -> None:
        try:
            data = await self._on_host(Priority.BACKGROUND, file.pack)
            await asyncio.to_thread(file.write, data)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caches must still be closed
            self._on_damage(f"novelty: {error!r}")

    def _remembered(self, future: "asyncio.Future[None]") -> None:
        self._remembering.discard(future)
        if not future.cancelled() and (error := future.exception()):
            self._on_damage(f"result cache: {error!r}")

    async def _on_host(self, priority: Priority, function: Callable[..., _T], *arguments: object) -> _T:
        """Calls a function on the host thread, in its turn."""
        return await self._turns.run(priority, partial(self._begin, function, *arguments))

    def _begin(self, function: Callable[..., _T], *arguments: object) -> "asyncio.Future[_T]":
        return asyncio.get_running_loop().run_in_executor(self._host, function, *arguments)

    def _chunks(self, texts: Sequence[object]) -> Iterator[slice]:
        """Parts of a call that are prepared, or read, at a time."""
        texts_max, chars_max = self._config.chunk_texts, self._config.chunk_chars
        start = chars = 0
        for position, text in enumerate(texts):
            own = len(text) if isinstance(text, str) else 0
            if position > start and (position - start == texts_max or chars + own > chars_max):
                yield slice(start, position)
                start, chars = position, 0
            chars += own
        if texts:
            yield slice(start, len(texts))


def _deliver_known(call: Call, start: int, prepared: Sequence[Prepared]) -> list[tuple[int, Prepared]]:
    """Delivers errors and cached outputs; returns what the device must compute, with its position in the call."""
    wanted = []
    for position, text in enumerate(prepared, start):
        if text.error:
            call.deliver(position, BadText(text.error))
        elif text.output is not None:
            call.deliver(position, text.output)
        else:
            wanted.append((position, text))
    return wanted
