"""Interleaved rounds: every variant runs once per round, in an order that turns, and ratios are taken round by round.

What slows the machine for a while then slows neighbours alike, which a ratio forgives and an absolute figure does not.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """Of several rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Entry:
    """One thing that is timed.

    Attributes:
        name: unique in a measurement.
        run: does it once; seconds and whatever else belongs to the run.
        texts: done by one run.
        tokens: real ones, done by one run.
    """

    name: str
    run: Callable[[], tuple[float, dict[str, Any]]]
    texts: int
    tokens: int


@dataclass
class Measured:
    """What came out for one entry; one value per round."""

    texts: int
    tokens: int
    seconds: list[float]
    details: dict[str, Any]

    @property
    def texts_per_s(self) -> list[float]:
        return [self.texts / each for each in self.seconds]

    @property
    def tokens_per_s(self) -> list[float]:
        return [self.tokens / each for each in self.seconds]


def spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def ratio(one: Measured, other: Measured) -> Spread:
    """How many times as fast `one` is, by real tokens per second: their sets of texts may differ in size."""
    return spread([a / b for a, b in zip(one.tokens_per_s, other.tokens_per_s, strict=True)])


def order(count: int, turn: int) -> list[int]:
    """Who runs when in a round: forward and backward in turns, each pair of rounds beginning one further."""
    start = turn // 2 % count
    turned = [(start + i) % count for i in range(count)]
    return turned if turn % 2 == 0 else turned[::-1]


def measure(entries: Sequence[Entry], rounds: int, *, title: str, until_s: float = float("inf")) -> dict[str, Measured]:
    """Runs all entries `rounds` times; fewer rounds when the clock passes `until_s` (monotonic), but at least one."""
    results = {entry.name: Measured(entry.texts, entry.tokens, [], {}) for entry in entries}
    for turn in range(rounds):
        begun_s = time.monotonic()
        for position in order(len(entries), turn):
            entry = entries[position]
            seconds, details = entry.run()
            results[entry.name].seconds.append(seconds)
            results[entry.name].details = details
            say(f"{title}: round {turn + 1} of {rounds}: {entry.name} {entry.texts / seconds:,.0f} texts/s")
        took_s = time.monotonic() - begun_s
        if turn + 1 < rounds and time.monotonic() + took_s > until_s:
            say(f"{title}: {turn + 1} rounds instead of {rounds}: out of time")
            break
    return results


def row(name: str, results: Mapping[str, Measured], *, first: str, before: str | None) -> dict[str, Any]:
    """A table's row: medians over the rounds, and ratios to the first row and to the one before."""
    mine = results[name]
    return {
        "name": name,
        "texts_per_s": spread(mine.texts_per_s)._asdict(),
        "tokens_per_s": spread(mine.tokens_per_s)._asdict(),
        "padding_share": mine.details.get("padding_share"),
        "ratio_to_first": ratio(mine, results[first])._asdict(),
        "ratio_to_before": ratio(mine, results[before])._asdict() if before else None,
        "rounds": len(mine.seconds),
    }


def say(text: str) -> None:
    """Progress, on stderr: one line that is written over on a terminal."""
    terminal = sys.stderr.isatty()
    sys.stderr.write(f"\r\x1b[K{text[:150]}" if terminal else f"{text}\n")
    sys.stderr.flush()
