"""Gathers everything that is outside the site, and searches it for what must not be there.

Outside is: Kafka (keys, values and headers of every message in every partition of every topic), the lake (every file,
as it is and decoded), what central keeps for itself, and the logs and metrics of all parts, which may be collected
anywhere. The agent's spool, the sealed store and the quarantine are the site's.

The sealed store is searched too, twice: as a thief would (its files, in which nothing may be readable) and as the site
does (`sluice sealed query`, in which every canary must be).
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sluice.demo.canaries import Canary, needles
from sluice.demo.kafka_dump import dump
from sluice.demo.pipeline import GATEWAY, Pipeline, plain_environment
from sluice.demo.search import TokenSearch
from sluice.errors import Permanent

KAFKA: Final = "kafka"
LAKE: Final = "lake"
SEALED: Final = "sealed"
_QUERY_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the search found.

    Attributes:
        leaked: a line for each canary that was found.
        beacons_found: those found in Kafka and in the lake.
        bytes_searched: with all layers of compression.
        unopened: compressed frames over a limit, which were not searched.
    """

    leaked: tuple[str, ...]
    beacons_found: int
    bytes_searched: int
    unopened: int


def gather(
    pipeline: Pipeline, canaries: Sequence[Canary], beacons: Sequence[Canary], metrics: Mapping[str, str]
) -> Evidence:
    """Searches what a pipeline left outside the site, while its Kafka still answers.

    Args:
        pipeline: whose parts have ended.
        canaries: must not be found.
        beacons: must be found.
        metrics: the last `/metrics` of each part.
    """
    search = TokenSearch(dict(needles([*canaries, *beacons])))
    for blob in dump(pipeline.bootstrap):
        search.search(blob.data, KAFKA, blob.place)
    search_folder(search, pipeline.folders.lake, LAKE)
    search_folder(search, pipeline.folders.central, "central")
    search_folder(search, pipeline.folders.logs, "logs")
    for part, text in metrics.items():
        search.search(text.encode(), "metrics", part)
    return conclude(search, canaries, beacons)


def search_folder(search: TokenSearch, folder: Path, kind: str) -> None:
    """Searches every file below a folder, and its name: partition values are in paths."""
    for path in sorted(folder.rglob("*")):
        place = str(path.relative_to(folder))
        search.search(place.encode(), kind, f"{place} (its name)")
        if path.is_file():
            search.search(path.read_bytes(), kind, place)


def conclude(search: TokenSearch, canaries: Sequence[Canary], beacons: Sequence[Canary]) -> Evidence:
    """What a finished search means."""
    places = search.found.places
    leaked = []
    for canary in canaries:
        if canary.token in places:
            where = ", ".join(f"{kind}: {place}" for kind, at in places[canary.token].items() for place in at)
            leaked.append(f"{canary.kind} in {canary.carrier} found in {where}")
    found = search.found.in_all((beacon.token for beacon in beacons), (KAFKA, LAKE))
    return Evidence(tuple(leaked), len(found), search.found.bytes, search.found.unopened)


@dataclass(frozen=True, slots=True)
class SealedEvidence:
    """What the sealed store holds.

    Attributes:
        canaries_readable: with the key, on the site.
        canaries_in_clear: in the store's files, without it.
    """

    canaries_readable: int
    canaries_in_clear: int


def look_into_sealed(pipeline: Pipeline, canaries: Sequence[Canary]) -> SealedEvidence:
    """Searches the sealed store with and without its key.

    Raises:
        Permanent: `sluice sealed` failed.
    """
    clear = TokenSearch(dict(needles(canaries)))
    search_folder(clear, pipeline.folders.sealed, SEALED)
    argv = [sys.executable, "-m", "sluice", "sealed", "query", "--json", "--limit", "0"]
    argv += ["--config", str(pipeline.folders.config(GATEWAY))]
    done = subprocess.run(argv, capture_output=True, timeout=_QUERY_TIMEOUT_S, env=plain_environment(), check=False)
    if done.returncode != 0:
        raise Permanent(f"sluice sealed failed with status {done.returncode}: {done.stderr.decode().strip()}")
    readable = TokenSearch(dict(needles(canaries)))
    readable.search(done.stdout, SEALED, "sluice sealed query")
    return SealedEvidence(len(readable.found.places), len(clear.found.places))
