"""Resends are recognised, nothing is called settled that is not, and memory is bounded."""

import sys
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway.seen import Arrival, Seen
from sluice.record import Gap, GapReason, RecordBatch
from tests.sluice.examples import SPOOL

BASE = RecordBatch("d", SPOOL, 0, 1, "s", "site", b"")


def envelope(first: int, count: int, device: str = "d", gaps: tuple[Gap, ...] = ()) -> RecordBatch:
    return replace(BASE, device_id=device, first_sequence=first, record_count=count, gaps=gaps)


def memory(spools: int = 4, runs: int = 4, envelopes: int = 64) -> Seen:
    return Seen(spools_max=spools, runs_per_spool_max=runs, envelopes_max=envelopes)


def test_an_envelope_is_new_then_in_flight_then_settled() -> None:
    seen = memory()
    assert seen.admit(envelope(0, 10), b"x") is Arrival.NEW
    assert seen.admit(envelope(0, 10), b"x") is Arrival.IN_FLIGHT
    assert seen.admit(envelope(2, 3), b"part") is Arrival.IN_FLIGHT
    seen.settle(envelope(0, 10))
    assert seen.admit(envelope(0, 10), b"x") is Arrival.SETTLED
    assert seen.admit(envelope(5, 10), b"more") is Arrival.NEW


def test_a_released_envelope_is_new_again() -> None:
    seen = memory()
    seen.admit(envelope(0, 10), b"x")
    seen.release(envelope(0, 10))
    assert seen.admit(envelope(0, 10), b"x") is Arrival.NEW


def test_other_content_under_the_same_identity_is_noticed_in_flight_and_settled() -> None:
    seen = memory()
    seen.admit(envelope(0, 10), b"x")
    assert seen.admit(envelope(0, 10), b"y") is Arrival.REUSED
    seen.settle(envelope(0, 10))
    assert seen.admit(envelope(0, 10), b"y") is Arrival.REUSED
    assert seen.admit(envelope(0, 10), b"x") is Arrival.SETTLED


def test_records_that_expired_before_the_resend_are_no_clone() -> None:
    seen = memory()
    seen.admit(envelope(0, 10), b"x")
    seen.release(envelope(0, 10))
    assert seen.admit(envelope(0, 10, gaps=(Gap(0, 5, GapReason.EXPIRED),)), b"y") is Arrival.NEW


def test_all_below_the_first_hole_is_cumulative() -> None:
    seen = memory()
    assert seen.cumulative("d", SPOOL) == 0
    for first in (10, 0):
        seen.admit(envelope(first, 10), b"x")
        seen.settle(envelope(first, 10))
    assert seen.cumulative("d", SPOOL) == 20
    seen.admit(envelope(30, 1), b"x")
    seen.settle(envelope(30, 1))
    assert seen.cumulative("d", SPOOL) == 20
    assert seen.cumulative("other", SPOOL) == 0


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 200)), max_size=150))
def test_memory_stays_within_its_limits(arrivals: list[tuple[int, int]]) -> None:
    seen = memory(spools=3, runs=2, envelopes=5)
    for device, position in arrivals:
        batch = envelope(position * 2, 1, f"d{device}")
        if seen.admit(batch, b"x") is Arrival.NEW:
            seen.settle(batch)
        assert len(seen._settled) <= 3
        assert all(runs.run_count <= 2 for runs in seen._settled.values())
        assert len(seen._checksums) <= 5
        assert not seen._in_flight


class SeenMachine(RuleBasedStateMachine):
    """Against a model that forgets nothing: what is called settled was settled, what flies is not forwarded twice."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = memory(spools=2, runs=3)
        self.settled: dict[str, set[int]] = {}
        self.flying: list[RecordBatch] = []

    @rule(device=st.sampled_from("abc"), first=st.integers(0, 30), count=st.integers(1, 6))
    def arrive(self, device: str, first: int, count: int) -> None:
        batch = envelope(first, count, device)
        positions = set(range(first, first + count))
        arrival = self.seen.admit(batch, b"same")
        in_flight = {p for b in self.flying if b.device_id == device for p in range(b.first_sequence, b.stop_sequence)}
        if arrival is Arrival.SETTLED:
            assert positions <= self.settled.get(device, set())
        elif arrival is Arrival.IN_FLIGHT:
            assert positions <= in_flight
        else:
            assert arrival is Arrival.NEW
            assert not positions <= in_flight
            self.flying.append(batch)

    @rule(pick=st.integers(0, 100), good=st.booleans())
    def end(self, pick: int, good: bool) -> None:
        if not self.flying:
            return
        batch = self.flying.pop(pick % len(self.flying))
        if good:
            self.seen.settle(batch)
            self.settled.setdefault(batch.device_id, set()).update(range(batch.first_sequence, batch.stop_sequence))
        else:
            self.seen.release(batch)

    @invariant()
    def cumulative_is_settled(self) -> None:
        for device in "abc":
            assert set(range(self.seen.cumulative(device, SPOOL))) <= self.settled.get(device, set())


TestSeenMachine = SeenMachine.TestCase


def test_an_envelope_of_very_many_gaps_is_remembered_in_few_bytes() -> None:
    gaps = tuple(Gap(2 * i, 1, GapReason.EXPIRED) for i in range(10_000))
    seen = memory()
    before = sys.getrefcount(gaps)
    assert seen.admit(envelope(0, 20_000, gaps=gaps), b"x") is Arrival.NEW
    assert sys.getrefcount(gaps) == before, "the gaps themselves must not be kept"
    assert seen.admit(envelope(0, 20_000, gaps=gaps), b"y") is Arrival.REUSED
    assert seen.admit(envelope(0, 20_000, gaps=gaps[:-1]), b"y") is Arrival.IN_FLIGHT
