"""The configuration files of a pipeline on one machine, as the three parts read them.

Pure. They differ from the defaults where a person is watching (short intervals, small flushes) and in addresses and
folders; whatever is left out here is the production default.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sluice.demo.loopback import HOST

SITE: Final = "demo-site"
DEVICE: Final = "demo-device"
PARTITIONS: Final = 4
Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Addresses:
    """Ports on the loopback interface.

    Attributes:
        mqtt: of the MQTT broker.
        kafka: of the Kafka broker.
        edge: of the agent's metrics; so `gateway` and `central`.
        feed: of the gRPC feed.
    """

    mqtt: int
    kafka: int
    edge: int
    gateway: int
    central: int
    feed: int


@dataclass(frozen=True, slots=True)
class Folders:
    """Where a pipeline keeps things; all below one folder."""

    root: Path

    @property
    def lake(self) -> Path:
        """The cloud side's tables."""
        return self.root / "lake"

    @property
    def logs(self) -> Path:
        """A log file per process."""
        return self.root / "logs"

    @property
    def spool(self) -> Path:
        """The agent's."""
        return self.root / "edge" / "spool"

    @property
    def sealed(self) -> Path:
        """The gateway's sealed store."""
        return self.root / "site" / "sealed"

    @property
    def quarantine(self) -> Path:
        """The gateway's quarantine."""
        return self.root / "site" / "quarantine"

    @property
    def central(self) -> Path:
        """Central's own state."""
        return self.root / "central"

    def config(self, part: str) -> Path:
        """A part's configuration file."""
        return self.root / f"{part}.toml"


def edge(addresses: Addresses, folders: Folders, sources: Sequence[Mapping[str, Any]]) -> Tree:
    """The agent's configuration."""
    return {
        "device_id": DEVICE,
        "site": SITE,
        "mqtt": _mqtt(addresses),
        "spool": {"directory": str(folders.spool)},
        "batch": {"age_s_max": 0.5},
        "uplink": {"status_interval_s": 1.0, "ack_timeout_s": 3.0},
        "telemetry": _telemetry(addresses.edge),
        "sources": [dict(source) for source in sources],
    }


def gateway(addresses: Addresses, folders: Folders) -> Tree:
    """The gateway's configuration."""
    return {
        "site": SITE,
        "mqtt": _mqtt(addresses),
        "kafka": _kafka(addresses),
        "topics": {"partitions": PARTITIONS},
        "local": {"directory": str(folders.sealed), "key_create": True},
        "quarantine": {"directory": str(folders.quarantine)},
        "engine": _engine(),
        "telemetry": _telemetry(addresses.gateway),
    }


def central(addresses: Addresses, folders: Folders) -> Tree:
    """Central's configuration."""
    return {
        "state_dir": str(folders.central),
        "kafka": _kafka(addresses),
        "topics": {"partitions": PARTITIONS},
        "lake": {"uri": str(folders.lake), "flush_interval_s": 2.0, "flush_idle_s": 1.0},
        "feed": {"port": addresses.feed},
        "engine": _engine(),
        "telemetry": _telemetry(addresses.central),
    }


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """`base` with the values of `over`, table by table."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _mqtt(addresses: Addresses) -> Tree:
    return {"host": HOST, "port": addresses.mqtt, "reconnect_delay_s_max": 1.0}


def _kafka(addresses: Addresses) -> Tree:
    return {"bootstrap_servers": f"{HOST}:{addresses.kafka}"}


def _telemetry(port: int) -> Tree:
    return {"port": port}


def _engine() -> Tree:
    # Two engines on one machine: a quick fit at the start is enough.
    return {"fit_seconds_max": 0.5}
