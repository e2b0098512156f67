"""Apache Kafka (KRaft, one node), from the jars that `deploy/kafka/fetch.sh` fetches.

`kill` is a kill -9 of the JVM: what the broker acknowledged is in the page cache of this machine, so it survives that,
though not a power cut.
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

import pytest

from sluice.demo.kafka_broker import answers
from sluice.demo.loopback import HOST, free_port
from sluice.demo.processes import ManagedProcess, Supervisor
from tests.brokers.base import KafkaBroker

FORMAT_TIMEOUT_S = 60.0
_CLUSTER_ID = "c2x1aWNlLXRlc3RzLTAwMA"  # 16 bytes in base64, as Kafka wants it
# Small heap and quick compiler: it lives for seconds. The logger is slf4j-simple, on stderr.
_JAVA_OPTIONS = [
    "-Xms128m",
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
]
_CONFIG = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller_port}
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=PLAINTEXT://{host}:{advertised_port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
controller.listener.names=CONTROLLER
log.dirs={data}
auto.create.topics.enable=false
message.max.bytes=4194304
group.initial.rebalance.delay.ms=0
offsets.topic.num.partitions=4
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=250
log.cleaner.dedupe.buffer.size=4194304
"""


def jars() -> Path:
    """The folder of the jars; skips the test when they were not fetched."""
    cache = Path(os.environ.get("SLUICE_CACHE") or Path.home() / ".cache" / "sluice")
    libs = cache / "kafka" / "libs"
    if shutil.which("java") is None:
        pytest.skip("java is not installed: apt-get install default-jre-headless")
    if not (cache / "kafka" / "pom.xml").exists():
        pytest.skip(f"Apache Kafka's jars are not in {libs}: run deploy/kafka/fetch.sh (needs apt-get install maven)")
    return libs


class ApacheKafka(KafkaBroker):
    """Apache Kafka, broker and controller in one process."""

    name: ClassVar[str] = "kafka"
    durable: ClassVar[bool] = True
    start_timeout_s: ClassVar[float] = 60.0

    def __init__(self, folder: Path, advertised_port: int | None = None) -> None:
        super().__init__(folder, advertised_port)
        self._libs = jars()
        self._controller_port = free_port()

    def _spawn(self, supervisor: Supervisor) -> ManagedProcess:
        config = self._write_config()
        if not (self.data / "meta.properties").exists():
            self._format(config)
        argv = [*self._java(), "kafka.Kafka", str(config)]
        return supervisor.spawn("kafka", argv, ready_check=lambda: answers(f"{HOST}:{self.port}"))

    def _java(self) -> list[str]:
        return ["java", *_JAVA_OPTIONS, "-cp", f"{self._libs}/*"]

    def _write_config(self) -> Path:
        config = self.folder / "server.properties"
        text = _CONFIG.format(
            host=HOST,
            port=self.port,
            advertised_port=self.advertised_port,
            controller_port=self._controller_port,
            data=self.data,
        )
        config.write_text(text, encoding="utf-8")
        return config

    def _format(self, config: Path) -> None:
        """Formats the data folder: once with Kafka's tool (a JVM of 1.5 s), after a wipe from the copy of that."""
        pristine = self.folder / "pristine"
        if not pristine.exists():
            argv = [*self._java(), "kafka.tools.StorageTool", "format", "-t", _CLUSTER_ID, "-c", str(config)]
            done = subprocess.run(argv, capture_output=True, text=True, timeout=FORMAT_TIMEOUT_S, check=False)
            assert done.returncode == 0, f"kafka.tools.StorageTool: {done.stdout}{done.stderr}"
            shutil.copytree(self.data, pristine)
        shutil.copytree(pristine, self.data, dirs_exist_ok=True)
