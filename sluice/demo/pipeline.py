"""Agent, gateway and central as child processes with generated configuration files, and the brokers between them.

The same commands and files that production uses: `sluice edge|gateway|central --config FILE`. The demo runs one of
these, the integration tests kill parts of one, the benchmark loads one.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from sluice.config import PREFIX
from sluice.demo import configs, kafka_broker, mqtt_broker
from sluice.demo.broker_process import ready_line
from sluice.demo.configs import Addresses, Folders
from sluice.demo.loopback import HOST, free_port
from sluice.demo.processes import ManagedProcess, Supervisor
from sluice.demo.readings import Reading, scrape
from sluice.demo.toml_text import toml_text

EDGE: Final = "edge"
GATEWAY: Final = "gateway"
CENTRAL: Final = "central"
PARTS: Final = (EDGE, GATEWAY, CENTRAL)
MQTT: Final = "mqtt"
KAFKA: Final = "kafka"
_COMMENT: Final = "Written by `sluice demo`. Start this part alone with: sluice {part} --config {path}"


def plain_environment() -> dict[str, str]:
    """This process's environment without `SLUICE_...`: what a user set for a part of theirs is not meant for ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}


class Pipeline:
    """Use in a `with` block; leaving it kills whatever still runs.

    Args:
        root: an empty folder for everything.
        sources: the agent's.
        mqtt_port: of a broker that runs already; None: an embedded one is started.
        kafka_port: so for Kafka.
        overrides: by part, what its configuration should have otherwise.
        feed_port: of the feed; 0: any free one.
    """

    def __init__(
        self,
        root: Path,
        sources: Sequence[Mapping[str, Any]],
        *,
        mqtt_port: int | None = None,
        kafka_port: int | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        feed_port: int = 0,
    ) -> None:
        self.folders = Folders(root.absolute())
        self.addresses = Addresses(
            mqtt=mqtt_port or free_port(),
            kafka=kafka_port or free_port(),
            edge=free_port(),
            gateway=free_port(),
            central=free_port(),
            feed=feed_port or free_port(),
        )
        self._own_brokers = {MQTT: mqtt_port is None, KAFKA: kafka_port is None}
        self.supervisor = Supervisor(self.folders.logs)
        trees = {
            EDGE: configs.edge(self.addresses, self.folders, sources),
            GATEWAY: configs.gateway(self.addresses, self.folders),
            CENTRAL: configs.central(self.addresses, self.folders),
        }
        self._write({part: configs.merge(tree, (overrides or {}).get(part, {})) for part, tree in trees.items()})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.supervisor.close()

    @property
    def bootstrap(self) -> str:
        """Kafka's address."""
        return f"{HOST}:{self.addresses.kafka}"

    @property
    def feed_target(self) -> str:
        """The feed's address."""
        return f"{HOST}:{self.addresses.feed}"

    def start_brokers(self) -> list[ManagedProcess]:
        """Starts those brokers that are ours."""
        started = []
        for name, module in ((MQTT, mqtt_broker), (KAFKA, kafka_broker)):
            if self._own_brokers[name]:
                port = getattr(self.addresses, name)
                argv = [sys.executable, "-m", module.__name__, "--port", str(port)]
                line = ready_line(module.NAME, port)
                started.append(self.supervisor.spawn(name, argv, ready_line=line))
        return started

    def start(self, part: str, *, stdin: int = subprocess.DEVNULL) -> ManagedProcess:
        """Starts (or, once it has ended, restarts) the agent, the gateway or central.

        Args:
            part: one of `PARTS`.
            stdin: as in `subprocess.Popen`.
        """
        url = f"http://{HOST}:{getattr(self.addresses, part)}/readyz"
        argv = [sys.executable, "-m", "sluice", part, "--config", str(self.folders.config(part))]
        return self.supervisor.spawn(part, argv, inherit=plain_environment(), ready_url=url, stdin=stdin)

    def start_role(self, role: str) -> ManagedProcess:
        """Starts one of central's roles as a process of its own, named after the role."""
        port = free_port()
        argv = [sys.executable, "-m", "sluice", CENTRAL, "--config", str(self.folders.config(CENTRAL)), "--role", role]
        env = {"SLUICE_TELEMETRY__PORT": str(port)}
        url = f"http://{HOST}:{port}/readyz"
        return self.supervisor.spawn(role, argv, env=env, inherit=plain_environment(), ready_url=url)

    def read(self, part: str) -> Reading:
        """A part's metrics; an empty reading when it does not answer."""
        return scrape(getattr(self.addresses, part))

    def _write(self, trees: Mapping[str, Mapping[str, Any]]) -> None:
        self.folders.root.mkdir(parents=True, exist_ok=True)
        for part, tree in trees.items():
            path = self.folders.config(part)
            path.write_text(toml_text(tree, _COMMENT.format(part=part, path=path)), encoding="utf-8")
