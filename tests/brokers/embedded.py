"""The embedded brokers, as their processes run in the demo."""

import sys
from typing import ClassVar

from sluice.demo import kafka_broker, mqtt_broker
from sluice.demo.broker_process import ready_line
from sluice.demo.processes import ManagedProcess, Supervisor
from tests.brokers.base import KafkaBroker, MqttBroker


class EmbeddedMqtt(MqttBroker):
    """rumqttd, in memory."""

    name: ClassVar[str] = "embedded"
    durable: ClassVar[bool] = False

    def _spawn(self, supervisor: Supervisor) -> ManagedProcess:
        argv = [sys.executable, "-m", "sluice.demo.mqtt_broker", "--port", str(self.port)]
        return supervisor.spawn("mqtt", argv, ready_line=ready_line(mqtt_broker.NAME, self.port))


class EmbeddedKafka(KafkaBroker):
    """Tansu, in memory."""

    name: ClassVar[str] = "embedded"
    durable: ClassVar[bool] = False

    def _spawn(self, supervisor: Supervisor) -> ManagedProcess:
        argv = [sys.executable, "-m", "sluice.demo.kafka_broker", "--port", str(self.port)]
        argv += ["--advertised-port", str(self.advertised_port)]
        return supervisor.spawn("kafka", argv, ready_line=ready_line(kafka_broker.NAME, self.port))
