"""The ledger's evidence, read from the lake's tables. The balancing itself is `sluice.ledger`, which is pure.

Tables are read in this order: status, records, ledger. A flush commits gaps before rows, so whatever row was seen, the
gaps beside it are seen too; and a status is never younger than the data it is held against. Records that are still on
their way through Kafka count as unexplained until they are committed: wait and look again.
"""

from collections.abc import Mapping
from typing import Any

from central.lake.reading import PositionReader
from central.lake.schema import TableName
from central.lake.store import DeltaStore
from sluice.ledger import FATE_OF_GAP, Fate, Ledger, SpoolEvidence, open_books, status_order

_STATUS_COLUMNS = (
    "site",
    "device_id",
    "spool_id",
    "next_sequence",
    "spool_records",
    "status_time_us",
    "received_time",
    "spool_ranges",
)
_FATES = {reason.name.lower(): fate for reason, fate in FATE_OF_GAP.items()}
Evidence = dict[tuple[str, str], SpoolEvidence]


def read_ledger(lake: DeltaStore, device: str | None = None) -> Ledger:
    """Balances the books of a lake.

    Args:
        lake: where to read.
        device: only this one; all when None.

    Raises:
        Retryable: the store does not answer, or files were vacuumed meanwhile; look again.
    """
    return open_books(collect_evidence(lake, device).values())


def collect_evidence(lake: DeltaStore, device: str | None = None) -> Evidence:
    """What the tables say, by device and spool (hexadecimal)."""
    where = {"device_id": device} if device else None
    reader = PositionReader(lake)
    evidence: Evidence = {}
    _add_statuses(evidence, lake, where)
    for (name, spool), found in reader.records(_paths(lake, TableName.RECORDS), where).items():
        spool_evidence = _of(evidence, name, spool)
        spool_evidence.lake_rows += found.rows
        for start, stop in found.runs.runs():
            spool_evidence.add(Fate.IN_LAKE, start, stop)
    for (name, spool, reason), found in reader.gaps(_paths(lake, TableName.LEDGER), where).items():
        # A reason that we do not know explains nothing: the positions stay unexplained, and show.
        fate = _FATES.get(reason)
        for start, stop in found.runs.runs() if fate else ():
            assert fate is not None
            _of(evidence, name, spool).add(fate, start, stop)
    return evidence


def _add_statuses(evidence: Evidence, lake: DeltaStore, where: Mapping[str, str] | None) -> None:
    """`next_sequence` never falls, whatever order statuses come in; what is in the spool is the latest one's word."""
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    heard: dict[tuple[str, str], Any] = {}
    for path in _paths(lake, TableName.STATUS):
        for row in lake.rows(TableName.STATUS, path, _STATUS_COLUMNS, where).to_pylist():
            found = _of(evidence, row["device_id"], row["spool_id"])
            found.next_sequence = max(found.next_sequence, row["next_sequence"])
            key = (row["device_id"], row["spool_id"])
            if key not in latest or _order(row) >= _order(latest[key]):
                latest[key] = row
            heard[key] = max(heard.get(key, row["received_time"]), row["received_time"])
    gone = _replaced(latest, heard)
    for key, row in latest.items():
        found = evidence[key]
        found.status_time_us = row["status_time_us"]
        for run in row["spool_ranges"] if key not in gone else ():
            found.add(Fate.IN_SPOOL, run["start"], run["stop"])


def _replaced(latest: Mapping[tuple[str, str], Mapping[str, Any]], heard: Mapping[tuple[str, str], Any]) -> set[Any]:
    """Spools of which nothing is left on their device, whatever their own last status says.

    A spool that was deleted, or damaged beyond knowing what it held, goes on under a new id, and never speaks of the
    old one again: what was lost with it would pass for waiting, for ever. But `spool_records` counts the remains of
    older ids too: when it is no more than the new one's own, there are none.
    """
    current: dict[tuple[str, str], tuple[str, str]] = {}
    for key, row in latest.items():
        device = (row["site"], row["device_id"])
        if device not in current or heard[key] > heard[current[device]]:
            current[device] = key
    gone = set()
    for key, row in latest.items():
        now = current[row["site"], row["device_id"]]
        own = sum(run["stop"] - run["start"] for run in latest[now]["spool_ranges"])
        if key != now and latest[now]["spool_records"] == own:
            gone.add(key)
    return gone


def _order(status: Mapping[str, Any]) -> tuple[int, int, int]:
    return *status_order(status["next_sequence"], status["spool_records"]), status["status_time_us"]


def _paths(lake: DeltaStore, name: TableName) -> list[str]:
    table = lake.tables.get(name)
    return table.open().paths() if table else []


def _of(evidence: Evidence, device: str, spool: str) -> SpoolEvidence:
    key = (device, spool)
    if key not in evidence:
        evidence[key] = SpoolEvidence(device, bytes.fromhex(spool))
    return evidence[key]
