"""The same path with both pairs of brokers, and through restarts of the real ones in mid-flow."""

import threading
from pathlib import Path

import pytest

from tests.brokers.base import Broker
from tests.brokers.clients import eventually
from tests.brokers.embedded import EmbeddedKafka, EmbeddedMqtt
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


POLICY_WITH_A_HOLE = """
[[rules]]
name = "a mistake"
stream = "logs"
outcome = "cloud"
"""


def test_a_policy_that_lets_personal_data_out_is_noticed(tmp_path: Path) -> None:
    # Else an empty search in the tests above would show nothing.
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY_WITH_A_HOLE)
    for name in ("mqtt", "kafka"):
        (tmp_path / name).mkdir()
    with (
        EmbeddedMqtt(tmp_path / "mqtt") as mqtt,
        EmbeddedKafka(tmp_path / "kafka") as kafka,
        Plant(tmp_path / "plant", mqtt, kafka, seed=4, policy_file=policy) as plant,
    ):
        flow(plant, 1000)
        plant.lines.stop()
        lines = len(plant.lines.harmless) + len(plant.lines.personal)
        eventually(lambda: plant.lake.rows("records", "stream = 'logs'") == lines, "all lines in the lake", 60.0)
        evidence = plant.search()
    assert len(evidence.leaked) == len(plant.lines.canaries) > 0
    assert "kafka: sluice.records/" in evidence.leaked[0]
    assert "lake: records/" in evidence.leaked[0]
