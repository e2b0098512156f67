"""Reads what a part says of itself on `/metrics`."""

import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

_TIMEOUT_S: Final = 2.0
_BYTES_MAX: Final = 8 << 20


class Reading:
    """The samples of one scrape; empty when the part did not answer."""

    def __init__(self, text: str = "") -> None:
        self.text = text
        self._samples = [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]

    def __bool__(self) -> bool:
        return bool(self._samples)

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels; 0 when there is none."""
        wanted = labels.items()
        return sum(value for found, has, value in self._samples if found == name and wanted <= has.items())

    def by(self, name: str, label: str) -> Mapping[str, float]:
        """A metric's sums by the value of a label."""
        sums: dict[str, float] = {}
        for found, has, value in self._samples:
            if found == name and label in has:
                sums[has[label]] = sums.get(has[label], 0.0) + value
        return sums


def scrape(port: int, host: str = "127.0.0.1") -> Reading:
    """What a part says now; an empty reading when it does not answer."""
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=_TIMEOUT_S) as answer:
            return Reading(answer.read(_BYTES_MAX).decode())
    except (urllib.error.URLError, OSError, ValueError):
        return Reading()
