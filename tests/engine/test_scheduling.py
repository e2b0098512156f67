"""What the scheduler is good for, in simulated time on a log-normal mix of lengths: little padding, short waits."""

import pytest

from benchmarks.engine.scheduling import POLICIES, Ours, simulate, texts
from engine.buckets import reporting_class
from engine.config import REPORTING_CLASSES
from engine.lane import Priority

TEXTS = 1500
BACKLOG = texts(TEXTS)


@pytest.fixture(scope="module")
def capacity() -> float:
    """Texts per second of the padded policy."""
    return TEXTS / simulate(Ours(), BACKLOG).seconds


@pytest.mark.parametrize("lanes", [1, 2])
def test_in_a_backlog_less_than_four_percent_is_padding(lanes: int) -> None:
    assert simulate(Ours(), BACKLOG, lanes=lanes).padding_share < 0.04


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("load", [0.2, 0.5, 0.65, 0.8, 0.95])
def test_in_a_stream_less_than_eight_percent_is_padding(capacity: float, load: float, lanes: int) -> None:
    assert simulate(Ours(), texts(TEXTS, rate=load * capacity * lanes), lanes=lanes).padding_share < 0.08


def test_fine_classes_cost_no_throughput_and_packing_none_either(capacity: float) -> None:
    coarse = TEXTS / simulate(POLICIES["ours, CUDA graphs"](), BACKLOG).seconds
    packed = TEXTS / simulate(Ours(packed=True), BACKLOG).seconds
    assert capacity > 1.08 * coarse
    assert packed > 0.99 * capacity
    for load in (0.5, 0.8):
        arriving = texts(TEXTS, rate=load * capacity)
        fine, wide = simulate(Ours(), arriving), simulate(POLICIES["ours, CUDA graphs"](), arriving)
        for priority in Priority:
            assert fine.latency(0.99, arriving, priority) < 1.05 * wide.latency(0.99, arriving, priority)


def test_online_texts_wait_a_fifth_of_what_a_sort_of_the_queue_lets_them_wait(capacity: float) -> None:
    for online, ours in ((0.2, "ours, padded"), (0.05, "ours, padded"), (0.05, "ours, packed")):
        arriving = texts(TEXTS, rate=0.75 * capacity, online=online)
        waits = {
            name: simulate(POLICIES[name](), arriving).latency(0.99, arriving, Priority.ONLINE)
            for name in (ours, "sort of 8 x 32")
        }
        assert waits[ours] < waits["sort of 8 x 32"] / 5


@pytest.mark.parametrize("name", ["ours, padded", "ours, packed"])
def test_at_the_edge_of_capacity_nothing_starves(name: str, capacity: float) -> None:
    arriving = texts(TEXTS, rate=0.95 * capacity, online=0.5)
    seen = simulate(POLICIES[name](), arriving)
    assert len(seen.latency_s) == TEXTS
    assert max(seen.latency_s.values()) < 8.0


def test_every_classic_class_is_reported_whatever_the_finer_classes_are() -> None:
    lengths = {max(item.tokens for item in batch) for _, batch in simulate(Ours(), BACKLOG).batches}
    assert {reporting_class(length, REPORTING_CLASSES) for length in lengths} == {32, 64, 128, 256}
