"""kill -9 of agent, gateway and central, 20 times each, in mid-flow: nothing is lost, doubled or let out.

All three are killed at the same time as each other, independently, at random moments: half of the kills hit a process
that has moved records since its start, the other half one that may still be starting. The analysis is killed as well,
three times.
"""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sluice.demo.pipeline import CENTRAL, EDGE, GATEWAY
from tests.brokers.clients import eventually
from tests.integration.conftest import Brokers
from tests.integration.plant import ANALYSIS, Plant

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
KILLS = 20
ANALYSIS_KILLS = 3
WORKS_TIMEOUT_S = 90.0
SEED = 20


def kill_often(plant: Plant, part: str, times: int) -> int:
    """Kills and restarts a part; returns how many kills hit it at work."""
    rng = random.Random(f"{SEED} {part}")
    pause = threading.Event()
    at_work = 0
    for number in range(times):
        process = plant.pipeline.supervisor.processes[part]
        if number % 2 == 0:
            eventually(lambda: plant.works(part), f"{part} works after kill {number}", WORKS_TIMEOUT_S)
            pause.wait(rng.uniform(0.0, 1.0))
            at_work += 1
        else:
            pause.wait(rng.uniform(0.0, 4.0))
        assert process.alive, f"{part} ended by itself: {process.log_tail()}"
        process.kill()
        pause.wait(rng.choice([0.0, 0.0, 1.0]))
        plant.restart(part)
    return at_work


def kill_analysis(plant: Plant) -> None:
    rng = random.Random(SEED)
    pause = threading.Event()
    for _ in range(ANALYSIS_KILLS):
        process = plant.pipeline.supervisor.processes[ANALYSIS]
        process.wait_ready(WORKS_TIMEOUT_S)
        pause.wait(rng.uniform(0.0, 3.0))
        process.kill()
        plant.restart(ANALYSIS)


def test_kill_9_of_every_part_in_mid_flow_costs_nothing(brokers: Brokers, tmp_path: Path) -> None:
    with Plant(tmp_path, *brokers, seed=SEED) as plant:
        with ThreadPoolExecutor(4) as killers:
            futures = [killers.submit(kill_often, plant, part, KILLS) for part in (EDGE, GATEWAY, CENTRAL)]
            killers.submit(kill_analysis, plant).result()
            assert [future.result() for future in futures] == [KILLS // 2] * 3
        plant.drain()
        books = plant.check()
    print(f"{books['accepted']} records, {books['in_lake']} in the lake, {books['kept_on_site']} kept on site")
