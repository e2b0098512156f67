"""The same path with both pairs of brokers, and through restarts of the real ones in mid-flow."""

import threading
from pathlib import Path

import pytest

from tests.brokers.base import Broker
from tests.brokers.clients import eventually
from tests.integration.conftest import Brokers
from tests.integration.plant import Plant

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]
PROGRESS_TIMEOUT_S = 60.0


def flow(plant: Plant, rows: int) -> None:
    """Waits until so many more records have come into the lake."""
    start = plant.lake.rows("records")
    eventually(lambda: plant.lake.rows("records") >= start + rows, f"{rows} more rows", PROGRESS_TIMEOUT_S)


def test_every_record_takes_its_way_and_every_personal_one_stays(brokers: Brokers, tmp_path: Path) -> None:
    with Plant(tmp_path, *brokers, seed=1) as plant:
        flow(plant, 2000)
        plant.drain()
        books = plant.check()
    assert books["accepted"] > 2000


@pytest.mark.parametrize("which", ["mqtt", "kafka"])
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_broker_that_goes_and_comes_back_costs_nothing(
    which: str, how: str, real_brokers: Brokers, tmp_path: Path
) -> None:
    broker: Broker = getattr(real_brokers, which)
    with Plant(tmp_path, *real_brokers, seed=2) as plant:
        flow(plant, 500)
        getattr(broker, how)()
        threading.Event().wait(2.0)  # records are produced meanwhile
        broker.start()
        flow(plant, 1000)
        plant.drain()
        plant.check()


def test_an_mqtt_broker_that_forgets_everything_costs_nothing(real_brokers: Brokers, tmp_path: Path) -> None:
    with Plant(tmp_path, *real_brokers, seed=3) as plant:
        for _ in range(2):
            flow(plant, 500)
            real_brokers.mqtt.kill()
            real_brokers.mqtt.wipe()
            real_brokers.mqtt.start()
        flow(plant, 1000)
        plant.drain()
        plant.check()
