"""One loaded model at work: from texts to outcomes. Several may live side by side; `service` holds the one in use.

Threads: this object lives on the event loop; `host` is the one thread that prepares texts and reads
results; the runner's thread drives the device and reports through `settle`.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Final, TypeVar

from engine.analysis import Analysis, Reading
from engine.config import EngineConfig
from engine.failures import BadText, DeadlinePassed
from engine.flights import NO_DEADLINE, Call, Flights, Place
from engine.lane import Priority
from engine.loading import Loaded
from engine.novelty import Novelty
from engine.prepare import CacheCounts, Prepared, Preparer
from engine.results import Output
from engine.runner import Report, Runner
from engine.tasks import find
from engine.token_pool import processes_for, reason_for
from sluice.errors import Backpressure

# Batches whose results wait to be put into the result cache; beyond it they are not remembered.
_REMEMBER_MAX: Final = 64

_T = TypeVar("_T")


class Session:
    """See the module's docstring.

    Args:
        config: the engine's section.
        loaded: the model.
        runner: driving its backend.
        host: an executor with one thread.
        clock: the runner's.
        on_damage: told, on the event loop's thread or the host's, when a cache is damaged.
    """

    def __init__(
        self,
        config: EngineConfig,
        loaded: Loaded,
        runner: Runner,
        host: ThreadPoolExecutor,
        clock: Callable[[], float],
        on_damage: Callable[[str], None],
    ) -> None:
        self.loaded = loaded
        self.runner = runner
        self.flights = Flights(runner)
        self._config = config
        self._host = host
        self._clock = clock
        self._on_damage = on_damage
        processes = processes_for(config.tokenizer_processes, loaded.info.device, len(os.sched_getaffinity(0)))
        loaded.reasons["tokenizer"] = reason_for(processes, config.tokenizer_processes)
        self._preparer = Preparer(
            loaded.tokenizer,
            loaded.output_version.encode(),
            config.text_bytes_max,
            config.caches,
            on_damage,
            processes,
            _vocabulary(loaded.card.config),
        )
        self._width = loaded.info.embedding_width
        self._novelty = Novelty(config.novelty, self._width) if config.novelty.enabled and self._width else None
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
            novelty=self._novelty,
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
            Backpressure: too many tokens wait.
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
        self, reading: Reading, outcomes: Sequence[Output | Exception | None], texts: Sequence[str]
    ) -> list[Analysis]:
        """Reads the outcomes of a call's texts on the host thread, chunk by chunk: others get their turn between."""
        analyses: list[Analysis] = []
        size = self._config.chunk_texts
        for start in range(0, len(texts), size):
            part = slice(start, start + size)
            analyses += await self._on_host(reading.read, outcomes[part], texts[part])
        return analyses

    def settle(self, report: Report) -> None:
        """A batch is done: on the event loop's thread."""
        fresh = self.flights.settle(report, self._clock())
        if fresh and len(self._remembering) < _REMEMBER_MAX:
            future = asyncio.ensure_future(self._on_host(self._preparer.remember, fresh))
            self._remembering.add(future)
            future.add_done_callback(self._remembered)

    async def close(self) -> None:
        """Closes the caches, after what is being remembered. The runner has ended before."""
        if self._remembering:
            await asyncio.wait(self._remembering)
        await self._on_host(self._preparer.close)

    async def _feed(self, call: Call, texts: Sequence[str], stream: str, priority: Priority, until_s: float) -> None:
        """Prepares the texts chunk by chunk and puts them under way, waiting for room between chunks."""
        cache = self._preparer.caches(stream)
        size = self._config.chunk_texts
        for start in range(0, len(texts), size):
            prepared = await self._on_host(self._preparer.prepare, texts[start : start + size], stream)
            wanted = _deliver_known(call, start, prepared)
            if not wanted:
                continue

            def board(place: Place | None = None, wanted: list[tuple[int, Prepared]] = wanted) -> None:
                self.flights.board(
                    call, wanted, now_s=self._clock(), priority=priority, deadline_s=until_s, cache=cache, place=place
                )

            try:
                board()
            except Backpressure as full:
                # The first chunk decides whether the call is accepted; the others wait for room.
                if not start:
                    raise
                await self._wait_for_room(board, priority, full.retry_after_s)

    async def _wait_for_room(self, board: Callable[[Place], None], priority: Priority, retry_after_s: float) -> None:
        """Tries whenever something was settled, in the order of arrival among those of its priority."""
        with self.flights.line(priority, retry_after_s) as place:
            while True:
                await self.flights.room(place.retry_after_s)
                try:
                    board(place)
                except Backpressure as full:
                    place.retry_after_s = full.retry_after_s
                else:
                    break

    def _remembered(self, future: "asyncio.Future[None]") -> None:
        self._remembering.discard(future)
        if not future.cancelled() and (error := future.exception()):
            self._on_damage(f"result cache: {error!r}")

    async def _on_host(self, function: Callable[..., _T], *arguments: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._host, function, *arguments)


def _vocabulary(config: Mapping[str, object]) -> int:
    size = config.get("vocab_size")
    return size if isinstance(size, int) else 0


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
