"""Whatever ends a process ends all of it: in order, within the deadline, and with the first error."""

import asyncio
import contextlib
import io
import os
import signal

import pytest

from sluice.service import serve, until_one_ends
from sluice.telemetry import Telemetry


class Part:
    """A service whose run and drain do what a test asks."""

    def __init__(self, name: str, journal: list[str], *, fails: Exception | None = None, drains: str = "well") -> None:
        self.name = name
        self.journal = journal
        self.fails = fails
        self.drains = drains
        self.drained = asyncio.Event()

    async def run(self) -> None:
        self.journal.append(f"{self.name} runs")
        if self.fails and self.drains != "with its error":
            raise self.fails
        try:
            await self.drained.wait()
        except asyncio.CancelledError:
            self.journal.append(f"{self.name} cut off")
            raise
        if self.fails:
            raise self.fails
        self.journal.append(f"{self.name} ends")

    async def drain(self, deadline_s: float) -> None:
        assert deadline_s > 0
        self.journal.append(f"{self.name} drains")
        if self.drains == "never":
            await asyncio.Event().wait()
        if self.drains == "badly":
            raise RuntimeError("cannot drain")
        if self.drains != "without ending":
            self.drained.set()


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def telemetry(log: io.StringIO) -> Telemetry:
    return Telemetry("test", stream=log)


async def test_stop_drains_all_in_the_given_order(telemetry: Telemetry) -> None:
    journal: list[str] = []
    stop = asyncio.Event()
    parts = [Part("source", journal), Part("sink", journal)]
    await serve(parts, telemetry, drain_deadline_s=5, stop=stop, on_ready=stop.set)
    assert journal == ["source runs", "sink runs", "source drains", "sink drains", "source ends", "sink ends"]


async def test_the_first_failure_drains_all_and_is_raised(telemetry: Telemetry, log: io.StringIO) -> None:
    journal: list[str] = []
    first, second = ValueError("disk"), KeyError("later")
    parts = [
        Part("late", journal, fails=second, drains="with its error"),
        Part("bad", journal, fails=first),
        Part("good", journal),
    ]
    with pytest.raises(ValueError, match="disk") as caught:
        await serve(parts, telemetry, drain_deadline_s=5)
    assert caught.value is first
    assert {"late drains", "bad drains", "good drains", "good ends"} <= set(journal)
    assert log.getvalue().count('"service_failed"') == 2


async def test_a_service_that_ends_by_itself_ends_all(telemetry: Telemetry) -> None:
    journal: list[str] = []
    short = Part("short", journal)
    short.drained.set()
    await serve([short, Part("long", journal)], telemetry, drain_deadline_s=5)
    assert "long ends" in journal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_a_second_one_does_no_harm(telemetry: Telemetry, number: signal.Signals) -> None:
    journal: list[str] = []

    def twice() -> None:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    await serve([Part("source", journal)], telemetry, drain_deadline_s=5, on_ready=twice)
    assert journal == ["source runs", "source drains", "source ends"]
    assert signal.getsignal(number) in {signal.SIG_DFL, signal.default_int_handler}


async def test_what_runs_at_the_deadline_is_cut_off_and_named(telemetry: Telemetry, log: io.StringIO) -> None:
    journal: list[str] = []
    stop = asyncio.Event()
    parts = [
        Part("stuck", journal, drains="never"),
        Part("slow", journal, drains="without ending"),
        Part("ok", journal),
    ]
    started = asyncio.get_running_loop().time()
    await serve(parts, telemetry, drain_deadline_s=0.3, stop=stop, on_ready=stop.set)
    took_s = asyncio.get_running_loop().time() - started
    assert "ok ends" in journal
    assert {"stuck cut off", "slow cut off"} <= set(journal)
    assert 0.3 <= took_s < 1.5
    late = [line for line in log.getvalue().splitlines() if "still running at the deadline" in line]
    assert sorted("slow" if '"slow"' in line else "stuck" for line in late) == ["slow", "stuck"]


async def test_one_that_cannot_drain_does_not_keep_the_others_from_it(telemetry: Telemetry, log: io.StringIO) -> None:
    journal: list[str] = []
    stop = asyncio.Event()
    parts = [Part("bad", journal, drains="badly"), Part("good", journal)]
    await serve(parts, telemetry, drain_deadline_s=0.3, stop=stop, on_ready=stop.set)
    assert "good ends" in journal
    assert "cannot drain" in log.getvalue()


async def test_a_stop_before_the_start_is_a_short_life(telemetry: Telemetry) -> None:
    journal: list[str] = []
    stop = asyncio.Event()
    stop.set()
    await serve([Part("source", journal)], telemetry, drain_deadline_s=5, stop=stop)
    assert journal[-1] == "source ends"


async def test_a_cancelled_process_leaves_no_task_behind(telemetry: Telemetry) -> None:
    journal: list[str] = []
    ready = asyncio.Event()
    task = asyncio.create_task(serve([Part("a", journal)], telemetry, drain_deadline_s=5, on_ready=ready.set))
    await ready.wait()
    await asyncio.sleep(0)  # the services get their first turn
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert journal == ["a runs", "a cut off"]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_failing_readiness_hook_leaves_no_task_behind(telemetry: Telemetry) -> None:
    def fail() -> None:
        raise OSError("cannot write the ready file")

    with pytest.raises(OSError, match="ready file"):
        await serve([Part("a", [])], telemetry, drain_deadline_s=5, on_ready=fail)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_part_that_dies_does_not_leave_its_service_looking_alive() -> None:
    cancelled = asyncio.Event()

    async def lasting() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def dying() -> None:
        raise ValueError("died")

    with pytest.raises(ValueError, match="died"):
        await until_one_ends(lasting(), dying())
    assert cancelled.is_set()
