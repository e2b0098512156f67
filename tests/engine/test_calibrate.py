"""What is measured at start-up, on devices whose time is virtual."""

from dataclasses import replace
from typing import Any

import pytest

from engine.buckets import Ladder
from engine.calibrate import BUSY, RUNS, SHAPES, SHAPES_GPU, _cost_reason, measure_costs
from engine.config import LADDER
from engine.cost import CostModel, CostTracker, fit, padded, relative_error
from tests.engine.fakes import FakeBackend

# A core that multiplies bfloat16 slowly: what the packed shapes take there is longer than the time given.
SLOW = CostModel(launch_s=0.005, token_s=0.00026, attention_s=2e-7, row_s=0.0)


class Timed(FakeBackend):
    """Takes the time that a cost model says, on a clock of its own."""

    def __init__(self, cost: CostModel, **settings: Any) -> None:
        super().__init__(length_max=256, **settings)
        self.cost, self.now_s, self.lengths = cost, 0.0, list[tuple[int, ...]]()

    def submit(self, rows: Any, length: int) -> object:
        lengths = [len(row) for row in rows] if self.packed else [length] * len(rows)
        self.now_s += self.cost.work_s(len(rows), sum(lengths), sum(each * each for each in lengths))
        self.lengths.append(tuple(lengths))
        return super().submit(rows, length)

    def clock(self) -> float:
        return self.now_s


@pytest.mark.parametrize("packed", [False, True])
def test_a_slow_device_repeats_less_and_still_sees_enough_shapes_for_a_fit(packed: bool) -> None:
    device = Timed(SLOW, packed=packed)
    samples = measure_costs(device, Ladder(LADDER, 256), 2.0, device.clock)
    # Four terms: with fewer shapes noise decides (seen: no launch cost at all, so batches of half the size).
    assert len(samples) >= 6
    model = fit(samples)
    assert relative_error(model, samples) < 0.01
    assert model.budget_tokens() == SLOW.budget_tokens() == 512
    assert model.launch_s == pytest.approx(SLOW.launch_s, rel=0.05)
    # What is under way when the time is up is ended, not more.
    assert device.now_s < 2.0 + 2 * SLOW.work_s(1024, 1024, 1024)


def test_a_fast_device_measures_every_shape_and_repeats_each() -> None:
    device = Timed(replace(SLOW, launch_s=1e-5, token_s=1e-7, attention_s=0.0))
    measure_costs(device, Ladder(LADDER, 256), 2.0, device.clock)
    runs = {lengths: device.lengths.count(lengths) for lengths in device.lengths}
    assert set(runs.values()) == {RUNS + 1}
    assert len(runs) == len(SHAPES) + len(SHAPES_GPU)


def test_a_fit_that_explains_little_says_so() -> None:
    costs = CostTracker([padded(1, 16, 0.01), padded(16, 48, 0.1), padded(4, 256, 0.13), padded(1, 256, 0.04)])
    assert BUSY not in _cost_reason(costs, costs.samples())
    strange = [*costs.samples(), padded(16, 48, 1.0), padded(4, 256, 0.02)]
    assert _cost_reason(costs, strange).endswith(BUSY)
