"""The line for room in a full queue, step by step: nobody waits for nothing, and nobody for ever.

The real queue and its books; the test is the devices' thread and the clock, so every run of a seed is the same.
"""

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest

from engine.backend import DeviceLost
from engine.buckets import Ladder
from engine.config import EngineConfig
from engine.cost import CostTracker
from engine.driver import Job
from engine.failures import DeadlinePassed
from engine.fleet import Device
from engine.flights import NO_DEADLINE, Call, Flights
from engine.lane import Priority
from engine.memory import Admission
from engine.prepare import Prepared
from engine.results import Output
from engine.runner import Report, Runner
from engine.scheduler import Limits, Scheduler
from sluice.errors import Backpressure, Retryable
from tests.engine.fakes import FakeBackend, embedding

QUEUE, BATCH = 300, 64
LENGTHS = (2, 5, 12, 30, 64)


class Works:
    """A queue with one device, which works when the test says."""

    def __init__(self) -> None:
        self.now_s = 0.0
        costs = CostTracker()
        limits = Limits(BATCH, 8, QUEUE, 0.25, (0.02, 0.25))
        scheduler = Scheduler(Ladder(EngineConfig().ladder, 64), limits, costs.model)
        self.device = Device("fake", FakeBackend(), costs, Admission(BATCH))
        self.reports: deque[Report] = deque()
        self.runner = Runner([self.device], scheduler, self.reports.append, clock=self.clock)
        scheduler.token_s = 60.0  # whoever is not woken would wait for a minute
        self.flights = Flights(self.runner, calls_in_line_max=6, passed_tokens_max=QUEUE)
        self.under_way: deque[Job] = deque()
        self.boarded: list[tuple[Priority, int]] = []

    def clock(self) -> float:
        return self.now_s

    async def call(self, chunks: Sequence[Sequence[int]], priority: Priority, deadline_s: float = NO_DEADLINE) -> Call:
        """As a session does it; a text is the number that names it, and its tokens are as many as that says."""
        call = Call(sum(map(len, chunks)))
        self.flights.admit(priority)
        try:
            position = 0
            for chunk in chunks:
                wanted = [(position + i, prepared(text)) for i, text in enumerate(chunk)]
                position += len(chunk)
                await self.flights.board(
                    call, wanted, clock=self.clock, priority=priority, deadline_s=deadline_s, cache=True
                )
            await call.wait()
        finally:
            self.flights.leave(call)
        return call

    def work(self, *, take: bool = True, die: bool = False) -> bool:
        """Starts a batch, or ends the oldest one. False when there was nothing to do."""
        job = self.runner.take(self.device, wait=False) if take and len(self.under_way) < 2 else None
        if job is not None:
            self.under_way.append(job)
        elif self.under_way:
            ended = self.under_way.popleft()
            if die:
                self.runner.give_back(ended, Report(), DeviceLost("gone"))
            else:
                rows = zip(ended.items, ended.rows, strict=True)
                self.reports.append(Report(outputs={item.id: embedding(row) for item, row in rows}))
        elif not self.reports:
            return False
        while self.reports:
            self.flights.settle(self.reports.popleft(), self.now_s)
        return True


def prepared(text: int) -> Prepared:
    return Prepared(key=text.to_bytes(4, "big"), ids=np.full(LENGTHS[text % len(LENGTHS)], text % 4000, np.int32))


async def settled() -> None:
    """Until all that can go on has done so."""
    for _ in range(12):
        await asyncio.sleep(0)


def check(calls: dict["asyncio.Task[Call]", list[int]]) -> None:
    for task, texts in calls.items():
        if task.cancelled():
            continue
        if error := task.exception():
            assert isinstance(error, Backpressure), error
            continue
        for text, outcome in zip(texts, task.result().outcomes, strict=True):
            row = prepared(text).ids
            if isinstance(outcome, Output):
                assert row is not None
                assert (outcome.row == embedding(row)).all()
            else:
                assert isinstance(outcome, DeadlinePassed | Retryable), outcome


@pytest.mark.parametrize("seed", range(25))
async def test_every_call_ends_whatever_is_cancelled_late_or_dies(seed: int) -> None:
    chance = random.Random(seed)
    works = Works()
    calls: dict[asyncio.Task[Call], list[int]] = {}
    for _ in range(150):
        works.now_s += chance.random()
        if chance.random() < 0.5:
            # A chunk of up to 16 texts may be larger than the whole queue.
            sizes = [chance.choice((1, 2, 16)) for _ in range(chance.choice((1, 1, 4)))]
            chunks = [[chance.randrange(80) for _ in range(size)] for size in sizes]
            until_s = works.now_s + chance.choice((0.5, 5.0, 50.0, NO_DEADLINE))
            task = asyncio.create_task(works.call(chunks, chance.choice(list(Priority)), until_s))
            calls[task] = [text for chunk in chunks for text in chunk]
        if chance.random() < 0.1 and calls:
            for task in chance.sample(list(calls), chance.randint(1, len(calls))):
                task.cancel()
        if chance.random() < 0.5:
            works.work(take=chance.random() < 0.7, die=chance.random() < 0.1)
        if chance.random() < 0.8:
            await settled()
    steps = 0
    while not all(task.done() for task in calls):
        await settled()
        assert works.work() or all(task.done() for task in calls), "a call waits, and nothing is under way"
        steps += 1
        assert steps < 2000
    check(calls)
    assert sum(not task.cancelled() and task.exception() is None for task in calls) > 5
    while works.work():
        pass
    assert (len(works.flights), works.runner.queued_tokens, len(works.runner._rows)) == (0, 0, 0)
    assert not any(works.flights._lines.values())


async def flooded(works: Works, waiting: Awaitable[Call], flood: Callable[[int], Awaitable[Call]]) -> int:
    """Batches until a call has ended, beside as many others as are accepted."""
    waits = asyncio.ensure_future(waiting)
    others: list[asyncio.Future[Call]] = []
    batches = 0
    while not waits.done():
        for _ in range(4):
            others.append(asyncio.ensure_future(flood(len(others))))
            await settled()
        works.now_s += 0.1
        works.work()
        await settled()
        batches += 1
        assert batches < 1000, "it waits for ever"
    for other in others:
        other.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    return batches


async def fill(works: Works, tokens: int, priority: Priority) -> "asyncio.Task[Call]":
    """Lets a call of texts of 64 tokens wait in the queue."""
    texts = [1_000_004 + 5 * i for i in range(tokens // 64)]
    task = asyncio.create_task(works.call([texts], priority))
    await settled()
    return task


@pytest.mark.parametrize("flood_texts", [1, 4])
async def test_background_is_not_kept_waiting_for_ever_by_online_calls(flood_texts: int) -> None:
    works = Works()
    first = await fill(works, 192, Priority.BACKGROUND)
    # 12 tokens each: 120 of them do not fit below the share that is online's.
    late = works.call([[2_000_002 + 5 * i for i in range(10)]], Priority.BACKGROUND)

    def online(i: int) -> Awaitable[Call]:
        return works.call([[3_000_002 + 5 * (flood_texts * i + each) for each in range(flood_texts)]], Priority.ONLINE)

    # It sees one queue pass, and then waits until the queue has room for it: two batches of 64 for each 100 tokens.
    assert await flooded(works, late, online) < 4 * (QUEUE + QUEUE) // BATCH * 2
    assert first.done()


async def test_background_comes_in_while_online_leaves_no_room_below_its_share() -> None:
    works = Works()
    await fill(works, 256, Priority.ONLINE)  # of 300, and background's share is 225

    def online(i: int) -> Awaitable[Call]:
        return works.call([[3_000_002 + 5 * i]], Priority.ONLINE)

    assert (
        await flooded(works, works.call([[2_000_001]], Priority.BACKGROUND), online) < 4 * (QUEUE + QUEUE) // BATCH * 2
    )


async def test_background_lines_up_in_a_queue_that_online_fills_and_no_longer_than_the_line() -> None:
    works = Works()
    await fill(works, 256, Priority.ONLINE)
    rest = asyncio.create_task(works.call([[2_000_000, 2_000_002, 2_000_003]], Priority.ONLINE))
    await settled()
    assert works.runner.queued_tokens == QUEUE
    with pytest.raises(Backpressure, match="queue is full"):
        await works.call([[3_000_001]], Priority.ONLINE)
    lined_up = [asyncio.create_task(works.call([[4_000_001 + 5 * i]], Priority.BACKGROUND)) for i in range(6)]
    await settled()
    with pytest.raises(Backpressure, match="calls_in_line_max"):
        await works.call([[5_000_001]], Priority.BACKGROUND)
    while works.work():
        await settled()
    assert all(task.done() for task in (rest, *lined_up))


async def test_a_large_online_call_is_not_kept_waiting_for_ever_by_background_calls() -> None:
    works = Works()
    first = await fill(works, 192, Priority.BACKGROUND)
    large = works.call([[2_000_003 + 5 * i for i in range(9)]], Priority.ONLINE)  # 30 tokens each

    def background(i: int) -> Awaitable[Call]:
        return works.call([[3_000_002 + 5 * i]], Priority.BACKGROUND)

    assert await flooded(works, large, background) < 2 * 2 * (QUEUE + QUEUE) // BATCH
    assert first.done()


async def test_who_leaves_queue_or_line_lets_the_next_one_in_at_once() -> None:
    works = Works()
    first = await fill(works, 192, Priority.BACKGROUND)
    large = asyncio.create_task(works.call([[2_000_004 + 5 * i for i in range(5)]], Priority.BACKGROUND))
    small = asyncio.create_task(works.call([[3_000_001]], Priority.BACKGROUND))
    await settled()
    assert works.runner.queued_tokens == 192
    large.cancel()
    await settled()
    assert works.runner.queued_tokens == 192 + 5, "the one behind it in the line"
    late = asyncio.create_task(works.call([[2_000_004 + 5 * i for i in range(3)]], Priority.BACKGROUND))
    await settled()
    first.cancel()
    await settled()
    assert works.runner.queued_tokens == 5 + 192, "the one that waited for its room"
    while works.work():
        await settled()
    assert all(outcome for task in (small, late) for outcome in task.result().outcomes)
