"""What `sluice engine bench` and `plan` show: figures, bars in the terminal, a picture. Pure, but for the picture.

The bars are drawn here with block characters: plotext changed its whole interface with version 6, and a few bars are
not worth a dependency that an ML host may have pinned to the other one.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from engine.bench import Measured, percentile
from engine.config import GENERATION_NAME
from sluice.errors import ConfigError, Permanent

_BLOCKS: Final = " ▏▎▍▌▋▊▉█"
_NAME_CHARS: Final = 14
_BAR_CHARS_MAX: Final = 50
_ROWS_MAX: Final = 12
# What a figure is of, of all that the engine chose.
_CHOSEN: Final = ("device", "backend", "threads", "workers", "precision", "packing", "lanes", "batch_tokens")


def plan_lines(plan: Mapping[str, Any], columns: int) -> Iterator[tuple[str, str]]:
    """Name and text of each line of a plan; a long reason is folded, and the name of its further lines is empty.

    The default model's choices come first, then each further model's under its name, indented.

    Args:
        plan: as `bench.plan` makes it.
        columns: of the terminal.
    """
    further = {**plan["models"], GENERATION_NAME: plan[GENERATION_NAME]}
    yield from _reasons(
        {name: reason for name, reason in plan.items() if name not in {"models", GENERATION_NAME}}, columns
    )
    for model, reasons in further.items():
        if reasons:
            yield "", ""
            yield model, ""
            yield from (("  " + name, reason) for name, reason in _reasons(reasons, columns - 2))


def _reasons(reasons: Mapping[str, str], columns: int) -> Iterator[tuple[str, str]]:
    width = max((len(name) for name in reasons), default=0)
    for name, reason in reasons.items():
        folded = textwrap.wrap(
            reason, max(30, columns - width - 2), break_on_hyphens=False, break_long_words=False
        ) or [""]
        for i, line in enumerate(folded):
            yield ("" if i else name).ljust(width), line


def report_lines(measured: Measured, columns: int) -> Iterator[str]:
    """Figures and bars, for people.

    Args:
        measured: what was measured.
        columns: of the terminal.
    """
    yield from _figures(measured)
    bar_chars = max(10, min(_BAR_CHARS_MAX, columns - _NAME_CHARS - 12))
    yield ""
    yield f"Latency of single online texts at {measured.figures['load']:.0%} of the capacity, by count"
    yield from bars(histogram([1e3 * each for each in measured.latencies_s]), bar_chars)
    yield ""
    yield "Batches of the full queue, by their length in tokens"
    yield from bars([(f"up to {length}", count) for length, count in measured.batches.items()], bar_chars)


def _figures(measured: Measured) -> Iterator[str]:
    figures, chosen = measured.figures, measured.figures["chosen"]
    tail = percentile(measured.latencies_s, 1.0) * 1e3
    lines = {
        "model": f"{figures['model']}, version {figures['model_version']}",
        "chosen": ", ".join(f"{name} {chosen[name].split(':')[0]}" for name in _CHOSEN if name in chosen),
        "task": figures["task"],
        "texts": f"{figures['texts']:,} in {figures['seconds']:,.1f} s: {figures['texts_computed']:,} computed "
        f"(of identical ones one), {figures['texts_failed']:,} failed, {figures['texts_truncated']:,} truncated",
        "throughput": f"{figures['texts_per_s']:,.1f} texts/s, {figures['tokens_per_s']:,.0f} tokens/s computed",
        "padding": f"{figures['padding_share']:.1%} of the tokens that the device computed",
        "device busy": f"{figures['device_busy_share']:.1%} of the time, {figures['devices']} device(s)",
        "latency": f"p50 {figures['p50_ms']:,.1f} ms, p99 {figures['p99_ms']:,.1f} ms, longest {tail:,.1f} ms "
        f"({figures['latency_samples']:,} texts)",
    }
    if hits := figures["token_cache_hits"] + figures["result_cache_hits"]:
        lines["caches"] = (
            f"{hits:,} hits: {figures['result_cache_hits']:,} results, {figures['token_cache_hits']:,} texts"
        )
    if unanswered := figures["latency_unanswered"]:
        lines["unanswered"] = (
            f"{unanswered:,} single texts had no answer in time: one by one, the engine does not keep up with this "
            "rate; try a lower --load"
        )
    for name, text in lines.items():
        yield f"{name:{_NAME_CHARS}} {text}"


def histogram(values_ms: Sequence[float]) -> list[tuple[str, int]]:
    """Counts in at most 12 classes whose edges grow by a constant factor, ascending; empty classes inside are kept."""
    positive = [max(each, 1e-3) for each in values_ms]
    if not positive:
        return []
    low, high = math.log(min(positive)), math.log(max(positive))
    rows = min(_ROWS_MAX, max(1, math.ceil((high - low) / math.log(1.15))))
    step = (high - low) / rows or 1.0
    counts = [0] * rows
    for value in positive:
        counts[min(rows - 1, int((math.log(value) - low) / step))] += 1
    return [
        (f"≤ {_rounded(math.exp(low + (i + 1) * step) if i < rows - 1 else max(positive))} ms", c)
        for i, c in enumerate(counts)
    ]


def _rounded(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def bars(rows: Sequence[tuple[str, int]], chars: int) -> Iterator[str]:
    """One line per row: name, bar, count. The longest bar has `chars` characters; what is not 0 shows.

    Args:
        rows: names and counts.
        chars: see above.
    """
    most = max((count for _, count in rows), default=0)
    if not most:
        yield "  nothing was measured"
        return
    for name, count in rows:
        eighths = max(round(8 * chars * count / most), 1 if count else 0)
        bar = "█" * (eighths // 8) + _BLOCKS[eighths % 8].strip()
        yield f"{name:>{_NAME_CHARS}} {bar} {count:,}"


def require_plotting(file: Path) -> None:
    """Says before anything is measured that a picture cannot be drawn.

    Raises:
        ConfigError: matplotlib is not installed, the folder is not there, or the file's ending says no format.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--plot {file}: no such folder")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if file.suffix.removeprefix(".").lower() not in kinds:
        raise ConfigError(f"--plot {file}: its ending must be one of {', '.join(sorted(kinds))}")


def draw(measured: Measured, file: Path) -> None:
    """Writes the latency distribution and the batches by length class as a picture; its ending says the format.

    Raises:
        Permanent: matplotlib cannot write it.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    latencies_ms = [1e3 * each for each in measured.latencies_s]
    shares = [(i + 1) / len(latencies_ms) for i in range(len(latencies_ms))]
    left.step(latencies_ms, shares, where="post")
    for share, style in ((0.50, "--"), (0.99, ":")):
        value = percentile(latencies_ms, share)
        left.axvline(value, color="grey", linestyle=style, label=f"p{share * 100:.0f} {value:,.1f} ms")
    if latencies_ms:
        left.set_xscale("log")
        left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        left.xaxis.set_minor_formatter(NullFormatter())
    left.set(xlabel="latency (ms)", ylabel="share of texts", ylim=(0, 1.02))
    left.set_title(f"single online texts at {measured.figures['load']:.0%} of capacity")
    left.legend(loc="lower right")
    names, counts = [str(length) for length in measured.batches], list(measured.batches.values())
    right.bar(names, counts)
    right.yaxis.get_major_locator().set_params(integer=True)
    right.set(xlabel="length class (tokens)", ylabel="batches")
    right.set_title(f"{measured.figures['texts_per_s']:,.0f} texts/s, padding {measured.figures['padding_share']:.1%}")
    figure.suptitle(str(measured.figures["model"]))
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise Permanent(f"--plot {file}: {error}") from error
