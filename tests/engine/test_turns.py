"""Whose turn it is on the host thread, in simulated time: order, shares, the bound, and who is cancelled."""

import asyncio
import gc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.lane import Priority
from engine.turns import Turns
from sluice.errors import Backpressure

ONLINE, BACKGROUND = Priority.ONLINE, Priority.BACKGROUND


class Bench:
    """Turns whose work ends when the test says so, after as long as it says."""

    def __init__(self, **keys: Any) -> None:
        self.now_s = 0.0
        self.turns = Turns(EngineConfig(**keys), lambda: self.now_s)
        self.begun: list[str] = []
        self._under_way: asyncio.Future[str] | None = None

    def ask(self, name: str, priority: Priority, *, new: bool = False) -> "asyncio.Task[str]":
        return asyncio.create_task(self.turns.run(priority, lambda: self._begin(name), new=new))

    async def end(self, seconds: float = 1.0) -> bool:
        """Ends the piece that is under way; False when there is none."""
        work, self._under_way = self._under_way, None
        if work is None:
            return False
        self.now_s += seconds
        work.set_result(self.begun[-1])
        await settled()
        return True

    def _begin(self, name: str) -> "asyncio.Future[str]":
        assert self._under_way is None, "one piece at a time"
        self.begun.append(name)
        self._under_way = asyncio.get_running_loop().create_future()
        return self._under_way


async def settled() -> None:
    """Lets every callback run that is due."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_online_goes_first_and_each_priority_in_the_order_of_arrival() -> None:
    bench = Bench()
    tasks = [bench.ask("running", BACKGROUND)]
    tasks += [bench.ask(f"background {i}", BACKGROUND) for i in range(3)]
    tasks += [bench.ask(f"online {i}", ONLINE) for i in range(3)]
    await settled()
    while await bench.end():
        pass
    online, background = [f"online {i}" for i in range(3)], [f"background {i}" for i in range(3)]
    assert bench.begun == ["running", *online, *background]
    assert [await task for task in tasks] == ["running", *background, *online]


async def test_background_has_its_share_of_the_time_however_much_online_waits() -> None:
    bench = Bench(online_batches_max=4)
    tasks = [bench.ask("b", BACKGROUND) for _ in range(4)] + [bench.ask("o", ONLINE) for _ in range(100)]
    await settled()
    while bench._under_way is not None:
        await bench.end(2.0 if bench.begun[-1] == "b" else 0.5)
    # A piece of background takes two seconds: online has eight, in pieces of half a second, then it is its turn.
    assert "".join(bench.begun) == "b" + ("o" * 16 + "b") * 3 + "o" * 52
    await asyncio.gather(*tasks)


async def test_what_online_took_while_no_background_waited_is_not_held_against_it() -> None:
    bench = Bench(online_batches_max=4)
    tasks = [bench.ask("background", BACKGROUND)]
    tasks += [bench.ask("online", ONLINE) for _ in range(4)]
    await settled()
    await bench.end(2.0)
    await bench.end(100.0)
    tasks += [bench.ask("background", BACKGROUND)]
    await settled()
    await bench.end(1.0)
    await bench.end(1.0)
    assert bench.begun == ["background", *["online"] * 4]
    while await bench.end():
        pass
    await asyncio.gather(*tasks)


async def test_new_calls_are_bounded_with_a_share_for_online_and_later_pieces_are_not() -> None:
    bench = Bench(calls_waiting_max=4, online_share=0.25)
    tasks = [bench.ask("running", BACKGROUND, new=True)]
    tasks += [bench.ask("call", BACKGROUND, new=True) for _ in range(3)]
    await settled()
    with pytest.raises(Backpressure, match="calls_waiting_max") as full:
        await bench.ask("refused", BACKGROUND, new=True)
    assert full.value.retry_after_s > 0
    tasks += [bench.ask("online", ONLINE, new=True)]
    tasks += [bench.ask("later piece", priority) for priority in Priority for _ in range(10)]
    await settled()
    with pytest.raises(Backpressure):
        await bench.ask("refused", ONLINE, new=True)
    assert await bench.end()  # the online one has begun: there is a place again
    tasks += [bench.ask("online", ONLINE, new=True)]
    while await bench.end():
        pass
    assert len(await asyncio.gather(*tasks)) == len(bench.begun) == 26
    assert "refused" not in bench.begun


async def test_who_is_cancelled_while_waiting_frees_its_place_at_once() -> None:
    bench = Bench(calls_waiting_max=2, online_share=0.0)
    running = bench.ask("running", BACKGROUND)
    doomed, other = (bench.ask(name, BACKGROUND, new=True) for name in ("doomed", "other"))
    await settled()
    doomed.cancel()
    await asyncio.wait([doomed])
    again = bench.ask("again", BACKGROUND, new=True)
    await settled()
    while await bench.end():
        pass
    assert bench.begun == ["running", "other", "again"]
    assert list(await asyncio.gather(running, other, again)) == bench.begun


async def test_who_is_cancelled_just_before_its_turn_is_passed_over() -> None:
    bench = Bench()
    running, doomed, other = (bench.ask(name, ONLINE) for name in ("running", "doomed", "other"))
    await settled()
    assert bench._under_way is not None
    work, bench._under_way = bench._under_way, None
    work.set_result("running")
    doomed.cancel()  # it learns of it after the turn was passed on
    await settled()
    assert bench.begun == ["running", "other"]
    await bench.end()
    assert await asyncio.gather(running, other) == ["running", "other"]


async def test_who_is_cancelled_when_its_turn_has_just_come_passes_it_on() -> None:
    bench = Bench()
    running, doomed, other = (bench.ask(name, ONLINE) for name in ("running", "doomed", "other"))
    await settled()
    assert bench._under_way is not None
    work, bench._under_way = bench._under_way, None
    work.add_done_callback(lambda _: doomed.cancel())  # runs right after the turn was passed on
    work.set_result("running")
    await settled()
    assert bench.begun == ["running", "other"]
    assert doomed.cancelled()
    await bench.end()
    assert await asyncio.gather(running, other) == ["running", "other"]


async def test_a_turn_lasts_as_long_as_its_work_also_when_its_caller_has_gone() -> None:
    bench = Bench()
    doomed, other = (bench.ask(name, ONLINE) for name in ("doomed", "other"))
    await settled()
    doomed.cancel()
    await asyncio.wait([doomed])
    await settled()
    assert bench.begun == ["doomed"]
    await bench.end()
    assert bench.begun == ["doomed", "other"]
    await bench.end()
    assert await other == "other"


async def test_what_fails_when_its_caller_has_gone_is_not_logged() -> None:
    bench = Bench()
    logged: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
    doomed = bench.ask("doomed", ONLINE)
    await settled()
    doomed.cancel()
    await asyncio.wait([doomed])
    assert bench._under_way is not None
    bench._under_way.set_exception(ValueError("a caller's text"))
    await settled()
    bench._under_way = None
    gc.collect()
    assert not logged


async def test_work_that_cannot_begin_or_fails_gives_the_turn_up() -> None:
    bench = Bench()

    def refuse() -> "asyncio.Future[str]":
        raise Backpressure("full by now", retry_after_s=1.0)

    running = bench.ask("running", ONLINE)
    refused = asyncio.create_task(bench.turns.run(ONLINE, refuse))
    failing, other = bench.ask("failing", ONLINE), bench.ask("other", ONLINE)
    await settled()
    await bench.end()
    assert bench._under_way is not None
    work, bench._under_way = bench._under_way, None
    work.set_exception(ValueError("a bug"))
    await settled()
    await bench.end()
    with pytest.raises(Backpressure, match="by now"):
        await refused
    with pytest.raises(ValueError, match="a bug"):
        await failing
    assert await asyncio.gather(running, other) == ["running", "other"]


async def test_a_caller_goes_on_before_the_next_piece_begins() -> None:
    bench = Bench()
    order = []

    async def call(name: str) -> None:
        await bench.turns.run(ONLINE, lambda: begin(name))
        order.append(f"{name} goes on")

    def begin(name: str) -> "asyncio.Future[str]":
        order.append(f"{name} begins")
        return bench._begin(name)

    calls = [asyncio.create_task(call(name)) for name in ("first", "second")]
    await settled()
    while await bench.end():
        pass
    await asyncio.gather(*calls)
    assert order == ["first begins", "first goes on", "second begins", "second goes on"]


Step = tuple[str, int, bool]
STEPS: st.SearchStrategy[list[Step]] = st.lists(
    st.tuples(st.sampled_from(["online", "background", "cancel", "end", "let run"]), st.integers(0, 30), st.booleans()),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_whatever_happens_each_piece_runs_once_or_was_refused_or_cancelled(steps: list[Step]) -> None:
    asyncio.run(_any_story(steps))


async def _any_story(steps: list[Step]) -> None:
    bench = Bench(calls_waiting_max=5, online_share=0.4)
    tasks: list[asyncio.Task[str]] = []
    for what, number, new in steps:
        if what == "end":
            await bench.end(number / 10)
        elif what == "let run":
            await settled()
        elif what == "cancel":
            for task in tasks[number : number + 1]:
                task.cancel()
        else:
            priority = ONLINE if what == "online" else BACKGROUND
            tasks.append(bench.ask(f"{what[0]}{len(tasks)}", priority, new=new))
    await settled()
    while await bench.end():
        pass
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    answered = [each for each in outcomes if isinstance(each, str)]
    assert all(isinstance(each, str | Backpressure | asyncio.CancelledError) for each in outcomes)
    assert len(bench.begun) == len(set(bench.begun))
    assert set(answered) <= set(bench.begun)
    for letter in "ob":
        numbers = [int(name[1:]) for name in bench.begun if name[0] == letter]
        assert numbers == sorted(numbers)
    assert (len(bench.turns), bench.turns._calls, bench.turns._busy) == (0, 0, False)
