"""A classifier that does not come back costs its batches the cloud, and nobody memory."""

import asyncio
import gc
import io
import threading
import weakref

from gateway.batches import Decision, Verdict
from gateway.judge import Judge
from gateway.path_config import RoutingConfig
from sluice.record import Record, RecordBatch, Route
from sluice.telemetry import Telemetry
from tests.sluice.examples import batch_of

CLEAN = Verdict(Decision(Route.CLOUD, "clean"))


class Stuck:
    """A classifier that returns when it is let go."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.calls = 0

    def classify(self, batch: RecordBatch) -> Verdict:
        self.calls += 1
        assert self.release.wait(20)
        return CLEAN


class Held(RecordBatch):
    """A batch that can be watched."""


def batch(number: int) -> RecordBatch:
    return batch_of(Record(1, text=f"text {number}"), first=number)


async def test_nothing_is_queued_behind_threads_that_do_not_come_back() -> None:
    stuck = Stuck()
    judge = Judge(stuck.classify, RoutingConfig(threads=2, timeout_s=0.05), Telemetry("gateway", stream=io.StringIO()))
    try:
        frames = []
        for number in range(8):
            one = Held(**{name: getattr(batch(number), name) for name in RecordBatch.__dataclass_fields__})
            frames.append(weakref.ref(one))
            parts = await judge.parts(one)
            assert parts.local is not None, "it stays"
            assert not parts.export.data
            del one, parts
        gc.collect()
        assert stuck.calls == 2
        assert sum(ref() is not None for ref in frames) <= 2, "only what the threads have is held"
        stuck.release.set()
        async with asyncio.timeout(5):
            while (await judge.parts(batch(99))).local is not None:
                continue
    finally:
        stuck.release.set()
        judge.close()


async def test_an_error_after_the_time_is_heard_by_nobody_and_frees_the_thread() -> None:
    release = threading.Event()

    def fail(_batch: RecordBatch) -> Verdict:
        assert release.wait(20)
        raise ValueError("too late")

    judge = Judge(fail, RoutingConfig(threads=1, timeout_s=0.05), Telemetry("gateway", stream=io.StringIO()))
    try:
        assert (await judge.parts(batch(0))).local is not None
        release.set()
        async with asyncio.timeout(5):
            assert (await judge.parts(batch(1))).local is not None
        gc.collect()
    finally:
        judge.close()
