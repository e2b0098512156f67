"""The live table on a terminal."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Final, NamedTuple, Self

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sluice.demo.listener import Heard
from sluice.demo.stages import Stages

# The record's way, one line per stage: its name here, in `Stages`, and where it happens.
_LINES: Final = (
    ("accepted", "accepted", "edge: durable in the spool"),
    ("in the spool", "in_spool", "edge: waiting for the gateway's acknowledgement"),
    ("received", "gateway_in", "gateway: by MQTT"),
    ("kept on site", "kept_on_site", "gateway: sealed; only a receipt leaves"),
    ("bridged", "bridged", "gateway: to Kafka"),
    ("in the lake", "in_lake", "central: committed to Delta / Parquet"),
    ("analysed", "results", "central: results of the engine"),
    ("fed: records", "feed_records", "client: by gRPC"),
    ("fed: results", "feed_results", "client: by gRPC, those of the site too"),
)
# These say how much is there now; a rate would mean nothing.
_LEVELS: Final = frozenset({"in_spool"})
_TEXT_CHARS_MAX: Final = 60


class View(NamedTuple):
    """What is shown."""

    headline: str
    totals: Stages
    per_s: Mapping[str, float]
    batches: Mapping[int, int]
    heard: Sequence[Heard]


class Screen:
    """Redraws in place; use in a `with` block. Without a terminal (`enabled=False`) it shows nothing."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self._live = Live(console=Console(stderr=False), auto_refresh=False, transient=True) if enabled else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def say(self, line: str) -> None:
        """A line of progress: above the table, or on stderr where there is none."""
        if self._live and self._live.is_started:
            self._live.console.print(Text(line))
        else:
            click.echo(line, err=True)

    def show(self, view: View) -> None:
        """Draws."""
        if self._live:
            self._live.update(render(view), refresh=True)


def render(view: View) -> Group:
    """The whole picture."""
    table = Table(title=None, expand=False, pad_edge=False)
    for name, justify in (("stage", "left"), ("total", "right"), ("per second", "right"), ("where", "left")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name, key, where in _LINES:
        total = getattr(view.totals, key)
        rate = "" if key in _LEVELS else f"{view.per_s.get(key, 0.0):,.0f}"
        table.add_row(name, f"{total:,}", rate, Text(where, style="dim"))
    lag = f"lag of the lake: {view.totals.lag_messages:,} messages"
    batches = ", ".join(f"≤{length}: {count:,}" for length, count in view.batches.items()) or "none yet"
    parts: list[RenderableType] = [
        Text(view.headline, style="bold"),
        table,
        Text(lag),
        Text(f"batches by length in tokens: {batches}"),
    ]
    return Group(*parts, *(_heard(heard) for heard in view.heard))


def _heard(heard: Heard) -> Text:
    result = heard.result
    text = heard.text or ("(stayed on the site)" if result.origin == "site" else "")
    short = text if len(text) <= _TEXT_CHARS_MAX else f"{text[: _TEXT_CHARS_MAX - 1]}…"
    line = Text(f"  {result.label:<26} {result.score:4.2f}  {result.stream:<8} ", no_wrap=True, overflow="ellipsis")
    return line.append(short, style="dim")
