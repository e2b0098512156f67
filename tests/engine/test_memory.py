"""Admission by memory."""

from hypothesis import given
from hypothesis import strategies as st

from engine.buckets import Ladder
from engine.calibrate import measure_memory
from engine.config import LADDER
from engine.memory import RECOVER_AFTER, Admission
from tests.engine.fakes import FakeBackend


@given(st.integers(1, 10_000), st.lists(st.integers(1, 20_000), max_size=50))
def test_the_limit_stays_between_one_token_and_the_budget(budget: int, failures: list[int]) -> None:
    admission = Admission(budget)
    for tokens in failures:
        admission.failed(tokens)
        assert 1 <= admission.tokens_max <= budget
        assert admission.tokens_max <= max(1, tokens)


def test_peaks_lower_the_limit_to_what_fits_with_the_margin() -> None:
    admission = Admission(10_000)
    admission.observe_peak(tokens=100, peak_bytes=100_000, free_bytes=2_000_000, share=0.9)
    assert admission.tokens_max == 1800
    admission.observe_peak(tokens=100, peak_bytes=50_000, free_bytes=2_000_000, share=0.9)
    assert admission.tokens_max == 1800, "the worst peak counts"


def test_after_a_failure_the_limit_recovers_slowly_up_to_the_ceiling() -> None:
    admission = Admission(1000)
    admission.failed(1000)
    assert admission.tokens_max == 500
    for _ in range(RECOVER_AFTER - 1):
        admission.succeeded()
    assert admission.tokens_max == 500
    for _ in range(5 * RECOVER_AFTER):
        admission.succeeded()
    assert admission.tokens_max == 1000


@given(st.integers(64, 5000), st.integers(64, 5000))
def test_warming_up_finds_a_batch_that_is_safe_and_not_much_smaller_than_what_fits(memory: int, budget: int) -> None:
    backend = FakeBackend(memory_tokens=memory)
    admission = Admission(budget)
    peaks = measure_memory(backend, admission, Ladder(LADDER, 64), share=1.0)
    # Below one row of the longest, limits are not told apart.
    assert admission.tokens_max <= min(memory, budget) + 64
    assert admission.tokens_max >= min(memory, budget) // 4
    assert all(peak <= 1000 * memory for peak in peaks.values())
    assert peaks.keys() == {32, 64}


def test_warming_up_keeps_the_margin_of_the_configured_share() -> None:
    admission = Admission(1 << 20)
    backend = FakeBackend()  # 1000 bytes a token, 2**30 bytes free
    measure_memory(backend, admission, Ladder(LADDER, 64), share=0.5)
    assert admission.tokens_max == (1 << 29) // 1000
    assert admission.bytes_per_token == 1000


def test_a_device_on_which_not_even_one_row_fits_is_left_with_the_smallest_limit() -> None:
    admission = Admission(1024)
    assert measure_memory(FakeBackend(memory_tokens=1), admission, Ladder(LADDER, 64), share=0.9) == {}
    assert 1 <= admission.tokens_max <= 32
