"""The agent's last status is its last word, however often it reports."""

from pathlib import Path

from tests.brokers.base import MqttBroker
from tests.edge.gateway_double import GatewayDouble, until
from tests.edge.test_agent import Life, config_of


async def test_no_periodic_status_comes_behind_the_goodbye(mqtt_broker: MqttBroker, tmp_path: Path) -> None:
    gateway = GatewayDouble(mqtt_broker.port)
    # Nearly always reporting, so that a goodbye meets a report on its way.
    config = config_of(mqtt_broker.port, tmp_path, uplink={"status_interval_s": 0.0001})
    async with gateway.running():
        for number in range(8):
            async with Life(config).running() as life:
                await life.emit(f"text {number}")
                await until(lambda: life.agent.spool.empty)
            # What was published before the end is here, since one broker's connection keeps the order.
            await until(lambda: any(not status.online for status in gateway.statuses))
            goodbye = [index for index, status in enumerate(gateway.statuses) if not status.online]
            assert all(not status.online for status in gateway.statuses[goodbye[0] :])
            assert gateway.statuses[-1].next_sequence == number + 1
            gateway.statuses.clear()
