"""How choices at start-up are measured."""

from collections.abc import Callable
from itertools import chain, repeat

from engine.probe import PROBE_LENGTH, PROBE_ROWS, measure, probe_batch


def test_candidates_take_turns_the_first_round_is_forgotten_and_the_least_time_counts() -> None:
    now_s, order = [0.0], []

    def taking(name: str, *takes_s: float) -> Callable[[], str]:
        left = chain(takes_s, repeat(takes_s[-1]))

        def run() -> str:
            order.append(name)
            now_s[0] += next(left)
            return name

        return run

    measured = measure(taking("a", 9.0, 3.0, 2.0), taking("b", 0.1, 4.0, 5.0), times=3, clock=lambda: now_s[0])
    assert [(name, round(seconds, 6)) for name, seconds in measured] == [("a", 2.0), ("b", 4.0)]
    assert order == ["a", "b"] * 4


def test_the_batch_fits_the_model_and_is_always_the_same() -> None:
    rows = probe_batch(256)
    assert [len(row) for row in rows] == [PROBE_LENGTH] * PROBE_ROWS
    assert all((one == other).all() for one, other in zip(rows, probe_batch(256), strict=True))
    assert {len(row) for row in probe_batch(8)} == {8}
