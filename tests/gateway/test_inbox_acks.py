"""Acknowledgements are told together, once, and what cannot be told is told later or dropped, never made up."""

import asyncio
import io
from collections.abc import Awaitable, Callable
from dataclasses import replace

from gateway.acks import Acks
from protos import control_pb2
from sluice.errors import Retryable
from sluice.record import RecordBatch
from sluice.telemetry import Telemetry
from tests.sluice.examples import SPOOL

BASE = RecordBatch("d", SPOOL, 0, 1, "s", "site", b"")


def settled(first: int, count: int, device: str = "d") -> RecordBatch:
    return replace(BASE, device_id=device, first_sequence=first, record_count=count)


class Wire:
    """Where acknowledgements go; `broken` while there is no way."""

    def __init__(self) -> None:
        self.told: list[tuple[str, control_pb2.Ack]] = []
        self.broken = False

    async def publish(self, topic: str, payload: bytes) -> None:
        if self.broken:
            raise Retryable("no way")
        self.told.append((topic, control_pb2.Ack.FromString(payload)))


def acks(publish: Callable[[str, bytes], Awaitable[object]], spools_max: int = 10, cumulative: int = 0) -> Acks:
    telemetry = Telemetry("test", stream=io.StringIO())
    return Acks("site", publish, lambda _d, _s: cumulative, telemetry, delay_s=0.0, spools_max=spools_max)


def ranges(ack: control_pb2.Ack) -> list[tuple[int, int]]:
    return [(run.first, run.last) for run in ack.ranges]


async def test_settled_ranges_of_a_spool_are_told_in_one_message() -> None:
    wire = Wire()
    collected = acks(wire.publish, cumulative=15)
    for batch in (settled(5, 5), settled(0, 5), settled(20, 1), settled(7, 1, "other")):
        collected.add(batch)
    assert await collected.flush()
    told = dict(wire.told)
    assert told.keys() == {"sluice/v1/site/d/ack", "sluice/v1/site/other/ack"}
    mine = told["sluice/v1/site/d/ack"]
    assert (mine.spool_id, mine.cumulative_sequence) == (SPOOL, 15)
    assert ranges(mine) == [(0, 9), (20, 20)]
    assert await collected.flush()
    assert len(wire.told) == 2


async def test_what_cannot_be_told_is_told_later() -> None:
    wire = Wire()
    wire.broken = True
    collected = acks(wire.publish)
    collected.add(settled(0, 5))
    assert not await collected.flush()
    collected.add(settled(5, 5))
    wire.broken = False
    assert await collected.flush()
    assert [ranges(ack) for _, ack in wire.told] == [[(0, 9)]]


async def test_what_waits_is_bounded_by_dropping_the_oldest() -> None:
    wire = Wire()
    collected = acks(wire.publish, spools_max=2)
    for device in ("a", "b", "c"):
        collected.add(settled(0, 1, device))
    await collected.flush()
    assert [topic.split("/")[3] for topic, _ in wire.told] == ["b", "c"]


async def test_nothing_is_told_without_a_connection() -> None:
    wire = Wire()
    collected = acks(wire.publish)
    connection = asyncio.Event()

    async def connected() -> None:
        await connection.wait()

    running = asyncio.create_task(collected.run(connected))
    collected.add(settled(0, 1))
    await asyncio.sleep(0)
    assert wire.told == []
    connection.set()
    async with asyncio.timeout(10):
        while not wire.told:  # noqa: ASYNC110 - one turn of the loop after the other
            await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
