"""The books: for every spool, each accepted sequence has exactly one fate. Pure.

The equality, per `(device_id, spool_id)`:

    accepted = in the lake + kept on site + quarantined + expired + dropped by policy + still in the spool

is checked by position, not by totals, so that one lost record and one counted twice cannot cancel out:
  * `unexplained`: accepted positions without any fate;
  * `conflicting`: positions with two fates (a record that is in the lake and was declared withheld, say);
  * `duplicate_rows`: rows of the lake beyond the first for a position.

`accepted` comes from the device's own status (so that a lost tail shows), or from the highest position seen, whichever
is higher: a status may be older than the data.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from sluice.intervals import IntervalSet
from sluice.record import GapReason


def status_order(next_sequence: int, spool_records: int) -> tuple[int, int]:
    """Orders the statuses of one spool: what is greater was said later.

    Without a clock, since a device's may jump (one status from the future would be the last word for ever), and a
    last-will arrives late: a spool's `next_sequence` never falls, and while it stays nothing is added to what waits.
    """
    return next_sequence, -spool_records


class Fate(Enum):
    """What became of a position. The value is the column's name in reports."""

    IN_LAKE = "in_lake"
    KEPT_ON_SITE = "kept_on_site"
    QUARANTINED = "quarantined"
    EXPIRED = "expired"
    DROPPED = "dropped"
    IN_SPOOL = "in_spool"


FATE_OF_GAP: Mapping[GapReason, Fate] = {
    GapReason.WITHHELD: Fate.KEPT_ON_SITE,
    GapReason.QUARANTINED: Fate.QUARANTINED,
    GapReason.EXPIRED: Fate.EXPIRED,
    GapReason.DROPPED: Fate.DROPPED,
}


@dataclass
class SpoolEvidence:
    """What is known of one spool.

    Attributes:
        next_sequence: from the device's last status; 0 when none arrived.
        fates: the positions by fate, as found in the lake's tables; IN_SPOOL from the last status.
        lake_rows: rows in the lake, duplicates included.
        status_time_us: of the last status, UTC microseconds; 0 when none arrived.
    """

    device_id: str
    spool_id: bytes
    next_sequence: int = 0
    fates: dict[Fate, IntervalSet] = field(default_factory=dict)
    lake_rows: int = 0
    status_time_us: int = 0

    def add(self, fate: Fate, start: int, stop: int) -> None:
        """Notes that `[start, stop)` met `fate`."""
        self.fates.setdefault(fate, IntervalSet()).add(start, stop)


@dataclass(frozen=True, slots=True)
class SpoolAccount:
    """The balance of one spool; counts are records."""

    device_id: str
    spool_id: bytes
    accepted: int
    counts: Mapping[Fate, int]
    unexplained: tuple[tuple[int, int], ...]
    conflicting: tuple[tuple[int, int], ...]
    duplicate_rows: int

    @property
    def balanced(self) -> bool:
        """Whether the equality holds, by position."""
        return not self.unexplained and not self.conflicting and self.duplicate_rows == 0

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "device_id": self.device_id,
            "spool_id": self.spool_id.hex(),
            "accepted": self.accepted,
            **{fate.value: self.counts[fate] for fate in Fate},
            "unexplained": sum(b - a for a, b in self.unexplained),
            "unexplained_ranges": [list(run) for run in self.unexplained],
            "conflicting": sum(b - a for a, b in self.conflicting),
            "conflicting_ranges": [list(run) for run in self.conflicting],
            "duplicate_rows": self.duplicate_rows,
            "balanced": self.balanced,
        }


def balance(evidence: SpoolEvidence) -> SpoolAccount:
    """Balances one spool.

    A position that the (older) status still saw in the spool and that has met its fate since is counted once, as that.
    """
    settled = IntervalSet()
    conflicts = IntervalSet()
    counts = dict.fromkeys(Fate, 0)
    for fate in Fate:
        if fate is Fate.IN_SPOOL:
            continue
        runs = evidence.fates.get(fate, IntervalSet()).runs()
        counts[fate] = sum(b - a for a, b in runs)
        for start, stop in runs:
            for a, b in list(settled.intersection(start, stop)):
                conflicts.add(a, b)
            settled.add(start, stop)
    spool = evidence.fates.get(Fate.IN_SPOOL, IntervalSet())
    accepted = max(evidence.next_sequence, *(stop for _, stop in (*settled.runs()[-1:], *spool.runs()[-1:])), 0)
    unexplained: list[tuple[int, int]] = []
    for start, stop in settled.missing(0, accepted):
        counts[Fate.IN_SPOOL] += sum(b - a for a, b in spool.intersection(start, stop))
        unexplained.extend(spool.missing(start, stop))
    in_lake = counts[Fate.IN_LAKE]
    return SpoolAccount(
        device_id=evidence.device_id,
        spool_id=evidence.spool_id,
        accepted=accepted,
        counts=counts,
        unexplained=tuple(unexplained),
        conflicting=tuple(conflicts.runs()),
        duplicate_rows=max(0, evidence.lake_rows - in_lake),
    )


@dataclass(frozen=True, slots=True)
class Ledger:
    """The balance of all spools."""

    accounts: tuple[SpoolAccount, ...]

    @property
    def balanced(self) -> bool:
        """Whether every spool balances. An empty ledger balances: nothing was accepted."""
        return all(account.balanced for account in self.accounts)

    def total(self, fate: Fate) -> int:
        """Records with this fate, over all spools."""
        return sum(account.counts[fate] for account in self.accounts)

    @property
    def accepted(self) -> int:
        """Records accepted by all spools."""
        return sum(account.accepted for account in self.accounts)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "balanced": self.balanced,
            "accepted": self.accepted,
            **{fate.value: self.total(fate) for fate in Fate},
            "unexplained": sum(b - a for account in self.accounts for a, b in account.unexplained),
            "conflicting": sum(b - a for account in self.accounts for a, b in account.conflicting),
            "duplicate_rows": sum(account.duplicate_rows for account in self.accounts),
            "spools": [account.as_dict() for account in self.accounts],
        }


def open_books(evidence: Iterable[SpoolEvidence]) -> Ledger:
    """Balances all spools, sorted by device and spool."""
    accounts = sorted((balance(e) for e in evidence), key=lambda a: (a.device_id, a.spool_id))
    return Ledger(tuple(accounts))
