"""The interface that embedded and real brokers share.

A broker's ports and folder are chosen when it is constructed and stay, so that a restart is seen as one by its clients.
`start` returns when the broker answers. `kill` is SIGKILL. `wipe` deletes what the broker stored (it must not run).
"""

from __future__ import annotations

import abc
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from sluice.demo.loopback import HOST, free_port
from sluice.demo.processes import Supervisor

if TYPE_CHECKING:
    from sluice.demo.processes import ManagedProcess

STOP_TIMEOUT_S = 15.0


class Broker(abc.ABC):
    """One broker process on the loopback interface.

    Attributes:
        name: as in the fixtures' parameters.
        durable: whether a restart keeps what it acknowledged.
        start_timeout_s: until it must answer.
    """

    name: ClassVar[str]
    durable: ClassVar[bool]
    start_timeout_s: ClassVar[float] = 20.0

    def __init__(self, folder: Path) -> None:
        self.host = HOST
        self.port = free_port()
        self.folder = folder
        self.data = folder / "data"
        self._supervisor = Supervisor(folder / "logs")
        self._process: ManagedProcess | None = None

    @abc.abstractmethod
    def _spawn(self, supervisor: Supervisor) -> ManagedProcess:
        """Starts the process, with a readiness check."""

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.alive

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> None:
        assert not self.running, "already started"
        self.data.mkdir(parents=True, exist_ok=True)
        self._process = self._spawn(self._supervisor)
        self._process.wait_ready(self.start_timeout_s)

    def stop(self) -> int | None:
        """SIGTERM. Returns the exit status; None when it was never started."""
        return self._process.stop(STOP_TIMEOUT_S) if self._process else None

    def kill(self) -> None:
        """SIGKILL."""
        if self._process:
            self._process.kill()

    def restart(self) -> None:
        """Starts it again on the same port and data, after `stop` or `kill`; stops it first when it runs."""
        self.stop()
        self.start()

    def wipe(self) -> None:
        assert not self.running, "stop it first"
        shutil.rmtree(self.data, ignore_errors=True)

    def log(self) -> str:
        return self._process.log_tail(200) if self._process else ""

    def close(self) -> None:
        """Ends it, and releases what belongs to it."""
        self._supervisor.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MqttBroker(Broker):
    """A broker that speaks MQTT 5."""


class KafkaBroker(Broker):
    """A broker that speaks Kafka's protocol.

    Args:
        folder: for data and logs.
        advertised_port: the port that clients are told to connect to: a proxy's. Own port by default.
    """

    def __init__(self, folder: Path, advertised_port: int | None = None) -> None:
        super().__init__(folder)
        self.advertised_port = advertised_port or self.port

    @property
    def bootstrap(self) -> str:
        return f"{self.host}:{self.advertised_port}"

    def create_topic(self, partitions: int = 1, prefix: str = "t") -> str:
        """Creates a topic with a fresh name, so that tests may share a broker."""
        from sluice.demo.kafka_broker import create_topics

        name = f"{prefix}.{uuid.uuid4().hex[:12]}"
        create_topics(self.bootstrap, {name: partitions})
        return name
