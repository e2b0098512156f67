"""Clients that lost the same broker do not come back at the same moment, nor never."""

import random

import pytest

from sluice.backoff import Backoff


def test_delays_grow_to_their_limit_and_not_beyond() -> None:
    ceilings = [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
    seen = [max(_delays(seed, 6)[i] for seed in range(300)) for i in range(6)]
    assert all(0.9 * ceiling < delay <= ceiling for delay, ceiling in zip(seen, ceilings, strict=True))


def test_delays_are_spread_over_the_whole_range() -> None:
    first = [_delays(seed, 1)[0] for seed in range(300)]
    assert min(first) < 0.05
    assert 0.2 < sum(first) / len(first) < 0.3


def test_an_outage_of_years_does_not_overflow() -> None:
    backoff = Backoff(0.5, 5.0, random.Random(1))
    assert all(0 <= backoff.next_s() <= 5.0 for _ in range(5000))


def test_success_starts_again_from_the_first_delay() -> None:
    backoff = Backoff(0.5, 60.0, random.Random(1))
    for _ in range(10):
        backoff.next_s()
    backoff.reset()
    assert backoff.next_s() <= 0.5


@pytest.mark.parametrize(("first_s", "max_s"), [(0, 1), (-1, 1), (2, 1)])
def test_limits_that_make_no_sense_are_a_programmers_error(first_s: float, max_s: float) -> None:
    with pytest.raises(AssertionError):
        Backoff(first_s, max_s)


def _delays(seed: int, count: int) -> list[float]:
    backoff = Backoff(0.5, 5.0, random.Random(seed))
    return [backoff.next_s() for _ in range(count)]
