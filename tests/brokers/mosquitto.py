"""Mosquitto 2, with a configuration of its own per broker.

Its queue for a client that is away is bounded by bytes, not by the default of 1000 messages (which drops what it has
acknowledged). It saves its state at a clean end and every second; a kill -9 loses what came since.
"""

import shutil
from typing import ClassVar

import pytest

from sluice.demo.loopback import HOST, accepts
from sluice.demo.processes import ManagedProcess, Supervisor
from tests.brokers.base import MqttBroker

_CONFIG = """\
{user}
listener {port} {host}
allow_anonymous true
persistence true
persistence_location {data}/
autosave_interval 1
max_queued_messages 0
max_queued_bytes 268435456
max_inflight_messages 100
max_packet_size 4194304
set_tcp_nodelay true
log_dest stdout
log_type error
log_type warning
log_type notice
connection_messages false
"""


def executable() -> str:
    """Mosquitto's path; skips the test when it is not installed."""
    found = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        pytest.skip("mosquitto is not installed: apt-get install mosquitto")
    return found


class Mosquitto(MqttBroker):
    """Mosquitto, with persistence."""

    name: ClassVar[str] = "mosquitto"
    durable: ClassVar[bool] = True

    def _spawn(self, supervisor: Supervisor) -> ManagedProcess:
        config = self.folder / "mosquitto.conf"
        # Started by root it becomes the user `mosquitto`, who may not write into this folder.
        text = _CONFIG.format(user="user root", host=HOST, port=self.port, data=self.data)
        config.write_text(text, encoding="utf-8")
        argv = [executable(), "-c", str(config)]
        return supervisor.spawn("mosquitto", argv, ready_check=lambda: accepts(self.port))
