"""What the spool's tests share: drafts with a payload that says what it is, and a spool in a temporary folder."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice.errors import Backpressure
from sluice.spool import Spool, SpoolConfig, SpoolItem
from sluice.telemetry import Telemetry

OWNER = "site/device"


@dataclass(frozen=True)
class Item:
    """A draft whose payload is its name and place, padded to a size with the name's last letter."""

    name: str
    record_count: int = 1
    priority: int = 5
    size_bytes: int = 0
    oldest_time_us: int = 1_700_000_000_000_000

    def encode(self, spool_id: bytes, first_sequence: int) -> bytes:
        return f"{self.name}@{first_sequence}|".encode().ljust(self.size_bytes, self.name[-1].encode())


def declare(spool_id: bytes, first_sequence: int, count: int, payload: bytes | None) -> bytes:
    return f"expired@{first_sequence}+{count}|".encode()


def open_spool(folder: Path, log: io.StringIO | None = None, **settings: Any) -> Spool:
    item_records_max = settings.pop("item_records_max", 50_000)
    defaults = {"directory": str(folder), "ballast_bytes": 0}
    telemetry = Telemetry("test", stream=log or io.StringIO())
    config = SpoolConfig(**(defaults | settings))
    return Spool(config, owner=OWNER, declare=declare, telemetry=telemetry, item_records_max=item_records_max)


def append_until_refused(spool: Spool, item: Callable[[int], Item], place: Callable[[int], bytes]) -> Backpressure:
    """Appends items 0, 1, ... with the cursor `c` until the spool refuses one."""
    for number in range(10_000):
        try:
            spool.append([item(number)], {"c": place(number)})
        except Backpressure as refused:
            return refused
    raise AssertionError("never refused")


def everything(spool: Spool) -> list[SpoolItem]:
    return spool.peek(items_max=1_000_000, bytes_max=1 << 40)


def names(spool: Spool) -> list[str]:
    return [item.payload.split(b"|")[0].decode() for item in everything(spool)]


def positions(items: list[SpoolItem]) -> set[tuple[bytes, int]]:
    return {(item.spool_id, s) for item in items for s in range(item.first_sequence, item.stop_sequence)}


def events(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]
