"""How a CPU is divided into lanes: measured, in turns, and only where it pays."""

import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.lanes import LanePlan, Twinned, candidates, choose_lanes
from tests.engine.fakes import FakeBackend
from tests.engine.test_backend import open_tiny, rows, run, same


class Clockwork(FakeBackend):
    """A device whose batches last as long as the test says; lanes of one plan run side by side."""

    def __init__(self, batch_s: dict[tuple[int, bool], float]) -> None:
        super().__init__()
        self.batch_s = batch_s
        self.spent: dict[tuple[int, bool], dict[int, float]] = defaultdict(lambda: defaultdict(float))
        self.lock = threading.Lock()

    def now(self) -> float:
        with self.lock:
            return sum(max(lanes.values()) for lanes in self.spent.values())

    def twin(self, threads: int = 0, cpus: Sequence[int] = ()) -> Any:
        whole = self

        class Twin(FakeBackend):
            def submit(self, rows: Any, length: int) -> object:
                plan = threads, bool(cpus)
                with whole.lock:
                    whole.spent[plan][id(self)] += whole.batch_s[plan]
                return super().submit(rows, length)

        return Twin()


def plan(batch_s: dict[tuple[int, bool], float], cpus: int = 2, seconds_max: float = 100.0) -> LanePlan:
    backend = Clockwork(batch_s)
    return choose_lanes(backend, range(cpus), seconds_max, backend.now)


def test_the_division_that_computes_most_is_chosen() -> None:
    # Keys: threads of a lane, pinned. With two threads a batch lasts 1 s, so two lanes pay below 2 s each.
    chosen = plan({(2, False): 1.0, (1, False): 1.7, (1, True): 1.7})
    assert (chosen.lanes, chosen.threads, chosen.pin) == (2, 1, False)
    assert "2 x 1 threads 1.18" in chosen.reason
    chosen = plan({(2, False): 1.0, (1, False): 1.8, (1, True): 1.5})
    assert (chosen.lanes, chosen.threads, chosen.pin) == (2, 1, True)
    four = {(4, False): 1.0, (2, False): 1.6, (2, True): 1.6, (1, False): 3.8, (1, True): 3.8}
    chosen = plan(four, cpus=4)
    assert (chosen.lanes, chosen.threads, chosen.pin) == (2, 2, False)


def test_a_lane_more_and_a_pin_have_to_pay() -> None:
    assert plan({(2, False): 1.0, (1, False): 1.95, (1, True): 1.95}).lanes == 1
    assert not plan({(2, False): 1.0, (1, False): 1.5, (1, True): 1.35}).pin


def test_without_time_or_choice_there_is_one_lane() -> None:
    batch_s = {(2, False): 1.0, (1, False): 1.1, (1, True): 1.1}
    assert plan(batch_s, seconds_max=0.6).lanes == 1
    assert "2.4 s were too short" in plan(batch_s, seconds_max=0.6).reason
    assert plan(batch_s, seconds_max=2.5).lanes == 2, "one round of all is worth some patience"
    assert plan(batch_s, cpus=1).threads == 1
    assert choose_lanes(FakeBackend(), range(8), 1.0).threads == 8


@pytest.mark.parametrize("cpus", [2, 3, 6, 8, 96])
def test_every_candidate_uses_all_cpus_once(cpus: int) -> None:
    for each in candidates(cpus):
        assert each.lanes * each.threads == cpus
        shares = [cpu for lane in range(each.lanes) for cpu in each.cpus(lane, range(cpus))]
        assert shares == (list(range(cpus)) if each.pin else [])


def test_twins_share_weights_and_outlive_each_other(tiny_models: dict[str, Path]) -> None:
    backend = open_tiny(tiny_models["bert"])
    assert isinstance(backend, Twinned)
    batch = rows(3, 17, 1, 40, 8)
    expected = run(backend, batch)
    twins = [backend.twin(1), backend.twin(1)]
    backend.close()
    twins[0].close()
    assert all(same(one, other) for one, other in zip(run(twins[1], batch), expected, strict=True))


def test_lanes_driven_side_by_side_do_not_mix_their_batches(tiny_models: dict[str, Path]) -> None:
    backend = open_tiny(tiny_models["bert"])
    assert isinstance(backend, Twinned)
    batches = [rows(*np.random.default_rng(seed).integers(1, 40, 9).tolist()) for seed in range(24)]
    expected = [run(backend, batch) for batch in batches]
    twins = [backend.twin(1) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        drives = [
            pool.submit(lambda lane=lane: [run(twins[lane], batch) for batch in batches[lane::3]]) for lane in range(3)
        ]
        got = [each.result() for each in drives]
    for lane, outputs in enumerate(got):
        for rows_, wanted in zip(outputs, expected[lane::3], strict=True):
            assert all(same(one, other) for one, other in zip(rows_, wanted, strict=True))


def test_threads_of_a_lane_are_set_where_it_is_driven_and_nowhere_else(tiny_models: dict[str, Path]) -> None:
    backend = open_tiny(tiny_models["bert"])
    assert isinstance(backend, Twinned)
    before = torch.get_num_threads()
    one, three = backend.twin(1), backend.twin(3)

    def drive(twin: Any) -> int:
        run(twin, rows(5, 9))
        return torch.get_num_threads()

    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        assert first.submit(drive, one).result() == 1
        assert second.submit(drive, three).result() == 3
        # The same thread may drive another lane later: at start-up it measures all of them.
        assert first.submit(drive, three).result() == 3
        assert first.submit(drive, one).result() == 1
    assert torch.get_num_threads() == before


def test_a_real_backend_gets_a_plan_that_names_its_figures(tiny_models: dict[str, Path]) -> None:
    chosen = choose_lanes(open_tiny(tiny_models["bert"]), [0, 1], 2.0)
    assert chosen.lanes * chosen.threads == 2
    assert "2 x 1 threads" in chosen.reason
