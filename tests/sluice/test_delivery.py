"""A delivery is settled exactly once, and a split one after all of its parts."""

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.delivery import Delivery
from sluice.errors import Permanent, Retryable
from sluice.record import Route


class Settlements(list[Exception | None]):
    """What `on_settle` was called with."""

    def delivery(self, batch: str = "abc") -> Delivery[str]:
        return Delivery(batch, self.append)


def letters(batch: str) -> list[tuple[Route, str]]:
    routes = itertools.cycle(Route)
    return [(next(routes), letter) for letter in batch]


def test_ack_and_nack_settle() -> None:
    settled = Settlements()
    settled.delivery().ack()
    error = Permanent("no")
    refused = settled.delivery()
    assert not refused.settled
    refused.nack(error)
    assert refused.settled
    assert settled == [None, error]


@pytest.mark.parametrize("first", ["ack", "nack"])
@pytest.mark.parametrize("second", ["ack", "nack"])
def test_a_second_settlement_is_a_programmers_error(first: str, second: str) -> None:
    settled = Settlements()
    delivery = settled.delivery()
    arguments = {"ack": (), "nack": (Retryable("no"),)}
    getattr(delivery, first)(*arguments[first])
    with pytest.raises(AssertionError, match="exactly once"):
        getattr(delivery, second)(*arguments[second])
    assert len(settled) == 1


@given(st.permutations(range(4)), st.sets(st.integers(0, 3)))
def test_a_split_delivery_settles_after_all_parts_with_the_first_error(order: list[int], failing: set[int]) -> None:
    settled = Settlements()
    delivery = settled.delivery("abcd")
    parts = delivery.split(letters)
    assert [(route, part.batch) for route, part in parts] == letters("abcd")
    errors = {number: Retryable(str(number)) for number in failing}
    for number in order:
        assert (settled, delivery.settled) == ([], False)
        part = parts[number][1]
        part.nack(errors[number]) if number in failing else part.ack()
    assert delivery.settled
    first = next((errors[number] for number in order if number in failing), None)
    assert settled == [first]


def test_parts_of_parts_settle_the_whole() -> None:
    settled = Settlements()
    (_, left), (_, right) = settled.delivery("ab").split(letters)
    for _, grandchild in left.split(lambda batch: [(Route.CLOUD, batch), (Route.LOCAL, batch)]):
        assert settled == []
        grandchild.ack()
    assert settled == []
    right.ack()
    assert settled == [None]


def test_an_error_without_truth_value_is_an_error() -> None:
    class Empty(Exception):
        def __len__(self) -> int:
            return 0

    settled = Settlements()
    (_, left), (_, right) = settled.delivery("ab").split(letters)
    error = Empty()
    left.nack(error)
    right.ack()
    assert settled == [error]


def test_a_delivery_does_not_split_into_nothing() -> None:
    delivery = Settlements().delivery()
    with pytest.raises(AssertionError, match="at least one part"):
        delivery.split(lambda _batch: [])
    assert not delivery.settled


async def test_async_with_acks_and_nacks() -> None:
    settled = Settlements()
    async with settled.delivery():
        assert settled == []
    error = Permanent("bad record")
    async with settled.delivery():
        raise error
    assert settled == [None, error]


async def test_cancellation_settles_and_goes_on() -> None:
    settled = Settlements()
    inside = asyncio.Event()

    async def work() -> None:
        async with settled.delivery():
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [type(error) for error in settled] == [Retryable]
    assert "CancelledError" in str(settled[0])
