"""The pipeline's stages in numbers, from the parts' own metrics. Pure."""

from collections.abc import Mapping
from typing import NamedTuple

from sluice.demo.readings import Reading


class Stages(NamedTuple):
    """Totals since the start, in records unless the name says otherwise; the order is the record's way."""

    accepted: int
    in_spool: int
    gateway_in: int
    kept_on_site: int
    bridged: int
    in_lake: int
    results: int
    feed_records: int
    feed_results: int
    lag_messages: int


def stages(
    edge: Reading, gateway: Reading, central: Reading, *, feed_records: int = 0, feed_results: int = 0
) -> Stages:
    """The stages as the three parts tell them; what the feed's client counted is handed in."""
    return Stages(
        accepted=int(edge.total("sluice_accepted_records_total")),
        in_spool=int(edge.total("sluice_spool_records")),
        gateway_in=int(gateway.total("sluice_inbox_records_total")),
        kept_on_site=int(gateway.total("sluice_bridge_gap_records_total")),
        bridged=int(gateway.total("sluice_bridge_records_total")),
        in_lake=int(central.total("sluice_lake_table_rows_total", table="records")),
        results=int(central.total("sluice_analysis_results_total")),
        feed_records=feed_records,
        feed_results=feed_results,
        lag_messages=int(central.total("sluice_lake_lag_messages")),
    )


def batches_per_length(*parts: Reading) -> Mapping[int, int]:
    """Batches that the engines computed, by the upper limit of their texts' length in tokens."""
    sums: dict[int, int] = {}
    for part in parts:
        for length, count in part.by("sluice_engine_batches_total", "length").items():
            if length.isdecimal():
                sums[int(length)] = sums.get(int(length), 0) + int(count)
    return dict(sorted(sums.items()))


class Rates:
    """Records per second of each stage, over the last few looks.

    Args:
        looks_max: how many looks a rate spans.
    """

    def __init__(self, looks_max: int = 6) -> None:
        self._looks_max = looks_max
        self._looks: list[tuple[float, Stages]] = []

    def add(self, now_s: float, totals: Stages) -> None:
        """Notes a look at a monotonic time."""
        self._looks = [*self._looks, (now_s, totals)][-self._looks_max :]

    def per_s(self) -> Mapping[str, float]:
        """By stage; 0 until there are two looks."""
        if len(self._looks) < 2:
            return dict.fromkeys(Stages._fields, 0.0)
        (first_s, first), (last_s, last) = self._looks[0], self._looks[-1]
        span_s = max(1e-6, last_s - first_s)
        return {name: (b - a) / span_s for name, a, b in zip(Stages._fields, first, last, strict=True)}
