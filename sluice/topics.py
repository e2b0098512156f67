"""Names of MQTT topics: `sluice/v1/{site}/{device}/{channel}`."""

from typing import Final, NamedTuple

from sluice.errors import Permanent
from sluice.record import validate_name

ROOT: Final = "sluice/v1"
UP: Final = "up"
ACK: Final = "ack"
STATUS: Final = "status"
CONFIG: Final = "config"
CHANNELS: Final = frozenset({UP, ACK, STATUS, CONFIG})


class Topic(NamedTuple):
    """The parts of a topic."""

    site: str
    device: str
    channel: str


def topic(site: str, device: str, channel: str) -> str:
    """The topic of a device's channel."""
    return f"{ROOT}/{site}/{device}/{channel}"


def parse(name: str) -> Topic:
    """Splits a topic.

    Raises:
        Permanent: when it is not one of ours.
    """
    parts = name.split("/")
    if len(parts) != 5 or "/".join(parts[:2]) != ROOT or parts[4] not in CHANNELS:
        raise Permanent(f"not a Sluice topic: {name[:256]!r}")
    return Topic(validate_name("site", parts[2]), validate_name("device", parts[3]), parts[4])
