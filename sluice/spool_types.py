"""What goes into the spool and comes out of it."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Draft(Protocol):
    """Something to append: covers `record_count` sequences that it does not know yet."""

    @property
    def record_count(self) -> int:
        """How many sequences it takes, at least 1."""
        ...

    @property
    def priority(self) -> int:
        """0 to 9; higher is sent first."""
        ...

    @property
    def oldest_time_us(self) -> int:
        """Event time of its oldest record, UTC microseconds."""
        ...

    def encode(self, spool_id: bytes, first_sequence: int) -> bytes:
        """The payload, now that its identity is known."""
        ...


@dataclass(frozen=True, slots=True)
class SpoolItem:
    """An item as read. `key` identifies it within this spool, and `receipt` says that it only declares a loss."""

    key: int
    spool_id: bytes
    first_sequence: int
    record_count: int
    priority: int
    receipt: bool
    payload: bytes

    @property
    def stop_sequence(self) -> int:
        """The first sequence behind the item."""
        return self.first_sequence + self.record_count


class SpoolDepth(NamedTuple):
    """What is unsettled; `bytes` counts against `bytes_max`."""

    records: int
    items: int
    bytes: int


@dataclass(frozen=True, slots=True)
class SpoolStatus:
    """Depth and limits at one moment. `pending` are the unsettled runs `[start, stop)` of `spool_id`."""

    spool_id: bytes
    next_sequence: int
    records: int
    items: int
    bytes: int
    expired_records: int
    oldest_time_us: int
    pending: tuple[tuple[int, int], ...]
    ballast: bool
