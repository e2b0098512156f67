"""Admission by memory."""

from hypothesis import given
from hypothesis import strategies as st

from engine.memory import RECOVER_AFTER, Admission


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
