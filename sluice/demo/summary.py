"""What a run of the demo showed, whether it kept the promises, and what to try next. Pure."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The numbers of a run; also the keys of `--json`.

    Attributes:
        seconds: how long records flowed; `seconds_total` is the whole run with start and drain.
        results: received by the feed's client, as are `feed_records`.
        duplicates_in_lake: counted from the table by identity, not by the ledger.
        canaries_leaked: the first few canaries that were found outside, and where.
        canaries_sealed: found on the site by `sluice sealed`; `canaries_sealed_in_clear` in its files without the key.
        problems: why the run failed; empty when it did not.
    """

    records_accepted: int
    records_in_lake: int
    records_kept_on_site: int
    records_quarantined: int
    records_expired: int
    records_dropped: int
    records_in_spool: int
    duplicates_in_lake: int
    results: int
    results_in_lake: int
    feed_records: int
    canaries_planted: int
    canaries_found_outside_site: int
    canaries_leaked: tuple[str, ...]
    canaries_sealed: int
    canaries_sealed_in_clear: int
    beacons_planted: int
    beacons_found: int
    bytes_searched: int
    ledger_balanced: bool
    agent_rss_bytes_max: int
    batches_by_length: Mapping[int, int]
    labels: Mapping[str, int]
    seconds: float
    seconds_total: float
    problems: tuple[str, ...] = ()

    def to_json(self) -> str:
        """One JSON object on one line."""
        return json.dumps(asdict(self))


def broken_promises(numbers: Mapping[str, Any]) -> Iterator[str]:
    """What in the numbers of a run must not be, in words.

    Args:
        numbers: the fields of `Summary`.
    """
    if not numbers["ledger_balanced"]:
        yield "the ledger does not balance"
    if leaked := numbers["canaries_found_outside_site"]:
        yield f"{leaked} canaries were found outside the site: {'; '.join(numbers['canaries_leaked'])}"
    if duplicates := numbers["duplicates_in_lake"]:
        yield f"{duplicates} rows of the lake are duplicates"
    if lost := numbers["canaries_planted"] - numbers["canaries_sealed"]:
        yield f"{lost} canaries are not in the sealed store"
    if clear := numbers["canaries_sealed_in_clear"]:
        yield f"{clear} canaries can be read in the sealed store's files without its key"
    if not numbers["canaries_planted"]:
        yield "no canary was planted: the run proves nothing about privacy"
    if (missing := numbers["beacons_planted"] - numbers["beacons_found"]) or not numbers["beacons_planted"]:
        yield f"{missing} of {numbers['beacons_planted']} beacons were not found in the cloud: the search is blind"
    if not numbers["results"]:
        yield "no result reached the client"
    if not numbers["feed_records"]:
        yield "no record reached the client"


def text(summary: Summary) -> str:
    """For a person."""
    s = summary
    fates = (
        f"{s.records_in_lake:,} in the lake + {s.records_kept_on_site:,} kept on site + "
        f"{s.records_quarantined:,} quarantined + {s.records_expired:,} expired + {s.records_dropped:,} dropped + "
        f"{s.records_in_spool:,} in the spool"
    )
    searched = f"{s.bytes_searched / 1e6:,.1f} MB of Kafka, lake, logs and metrics"
    labels = ", ".join(f"{name} {count:,}" for name, count in s.labels.items())
    rows = {
        "accepted": f"{s.records_accepted:,} records = {fates}",
        "ledger": "balances, position by position" if s.ledger_balanced else "DOES NOT BALANCE",
        "duplicates": f"{s.duplicates_in_lake:,} rows in the lake",
        "personal data": f"{s.canaries_planted:,} canaries planted, {s.canaries_found_outside_site:,} in {searched}",
        "sealed store": f"{s.canaries_sealed:,} canaries read with its key, {s.canaries_sealed_in_clear:,} without",
        "search works": f"{s.beacons_found:,} of {s.beacons_planted:,} harmless beacons found in Kafka and lake",
        "client (gRPC)": f"{s.feed_records:,} records, {s.results:,} results: {labels or 'none'}",
        "agent": f"{s.agent_rss_bytes_max / 1e6:.1f} MB of memory at most",
        "time": f"{s.seconds:.0f} s of {s.seconds_total:.0f} s, start and drain included",
    }
    lines = [f"{name:<15} {value}" for name, value in rows.items()]
    lines += [f"{'FAILED':<15} {problem}" for problem in s.problems]
    return "\n".join(lines)


def what_next(root: Path, *, kept: bool) -> str:
    """Commands to go on with."""
    lake = root / "lake"
    if not kept:
        return (
            "The files of this run are gone; --keep keeps them, and says what to do with them.\n"
            "While a demo runs, in another terminal: sluice tail --kinds results"
        )
    table = f"{lake}/records/**/*.parquet"
    query = f'import duckdb; print(duckdb.sql("from read_parquet($${table}$$) select stream, count(*) group by all"))'
    return "\n".join(
        [
            f"Everything of this run is in {root}: configurations, logs, lake, sealed store.",
            f"  sluice ledger --lake {lake}",
            f"  python -c '{query}'",
            f"  sluice sealed query --config {root / 'gateway.toml'} --limit 5   # what stayed on the site",
            "While a demo runs, in another terminal: sluice tail --kinds results",
        ]
    )
