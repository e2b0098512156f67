"""PNG plots of a result. Okabe and Ito's palette: told apart by the colour-blind, and in grey by their markers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine import machine

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999",
)  # fmt: skip
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")
WIDTH, DPI = 9.0, 130


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True})
    folder.mkdir(parents=True, exist_ok=True)
    where = machine.short(result["machine"])
    made = [_remedies(section, where, folder) for section in result.get("remedies", [])]
    made += [_peers(section, where, folder) for section in (result.get("peers") or {}).get("tables", [])]
    if result.get("latency"):
        made.append(_latency(result["latency"], where, folder))
    if result.get("padding"):
        made.append(_padding(result["padding"], where, folder))
    return made


def _bars(rows: Sequence[tuple[str, Mapping[str, float], str, str]], title: str, label: str, file: Path) -> Path:
    """Horizontal bars: name, spread, colour, what stands behind the bar."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(WIDTH, 0.9 + 0.36 * len(rows)), layout="constrained")
    places = range(len(rows))
    medians = [found["median"] for _, found, _, _ in rows]
    errors = [
        [found["median"] - found["low"] for _, found, _, _ in rows],
        [found["high"] - found["median"] for _, found, _, _ in rows],
    ]
    axes.barh(places, medians, color=[colour for _, _, colour, _ in rows], height=0.7)
    axes.errorbar(medians, places, xerr=errors, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
    for place, (_, found, _, text) in enumerate(rows):
        axes.text(found["high"], place, f"  {text}", va="center")
    axes.set_yticks(places, [name for name, _, _, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_xlim(0, max(found["high"] for _, found, _, _ in rows) * 1.18)
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(title, loc="left")
    figure.savefig(file, dpi=DPI)
    plt.close(figure)
    return file


def _remedies(section: Mapping[str, Any], where: str, folder: Path) -> Path:
    rows = [
        (
            row["name"],
            row["ratio_to_first"],
            (BLUE if not row["name"].startswith("OpenVINO") else GREEN) if row["kept"] else GREY,
            f"{row['ratio_to_first']['median']:.1f}",
        )
        for row in section["rows"]
    ]
    precision = f"MiniLM, {section['precision']} in the engine's rows"
    title = f"One remedy at a time, {section['workload']}: {precision}\n{where}"
    label = "times the naive program (median, least, greatest); grey: not kept; green: instead"
    return _bars(rows, title, label, folder / f"engine-remedies-{section['workload']}.png")


def _peers(section: Mapping[str, Any], where: str, folder: Path) -> Path:
    order = sorted(section["rows"], key=lambda row: (row["precision"] != "fp32", -row["texts_per_s"]["median"]))
    rows = [
        (
            row["name"],
            row["texts_per_s"],
            (BLUE if row["precision"] == "fp32" else GREEN) if row["name"].startswith("sluice") else GREY,
            f"{row['texts_per_s']['median']:,.0f}",
        )
        for row in order
    ]
    title = f"Peers on the same texts ({section['workload']}), MiniLM, fp32 and bf16, caches off\n{where}"
    label = "texts/s (median of interleaved rounds, least to greatest)"
    return _bars(rows, title, label, folder / f"engine-peers-{section['workload']}.png")


def _latency(rows: Sequence[Mapping[str, Any]], where: str, folder: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 4.2), sharey=True, layout="constrained")
    names = list(dict.fromkeys(row["system"] for row in rows))
    ours = names[0]
    for axes, basis in zip(panels, ("ours", "own"), strict=True):
        for i, name in enumerate(names):
            for kind, style in (("online", "-"), ("background", ":")):
                wanted = "ours" if name == ours else basis
                points = [r for r in rows if r["system"] == name and r["basis"] == wanted and r[f"{kind}_ms_p99"]]
                loads = [100 * point["load"] for point in points]
                axes.plot(
                    loads, [point[f"{kind}_ms_p99"] for point in points], style, color=COLOURS[i % len(COLOURS)],
                    marker=MARKERS[i % len(MARKERS)], label=f"{name}, {kind}", linewidth=1.5, markersize=5,
                )  # fmt: skip
                for point in points:
                    if point["overloaded"] and kind == "online":
                        place = (100 * point["load"], point["online_ms_p99"])
                        axes.annotate(
                            "overloaded", place, xytext=(0, 7), textcoords="offset points", fontsize=7, ha="center"
                        )
        axes.set_yscale("log")
        axes.set_xlabel(f"load, % of {ours}'s capacity" if basis == "ours" else "load, % of each system's own capacity")
        axes.grid(which="both", alpha=0.25)
    panels[0].set_ylabel("latency p99, ms (from when the text was due)")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=7.5, loc="outside lower center", ncols=2)
    figure.suptitle(f"Open loop, 5% online among background texts: MiniLM\n{where}", ha="left", x=0.02, fontsize=10)
    file = folder / "engine-latency.png"
    figure.savefig(file, dpi=DPI)
    plt.close(figure)
    return file


def _padding(found: Mapping[str, Mapping[str, float]], where: str, folder: Path) -> Path:
    import matplotlib.pyplot as plt

    names = list(found)
    policies = list(dict.fromkeys(policy for shares in found.values() for policy in shares))
    figure, axes = plt.subplots(figsize=(WIDTH, 1.0 + 0.42 * len(policies)), layout="constrained")
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [place + i * height for place in range(len(policies))]
        shares = [100 * found[name].get(policy, 0.0) for policy in policies]
        bars = axes.barh(
            places, shares, height=height, color=COLOURS[i], label=name, hatch=("", "//", "..")[i % 3], alpha=0.9
        )
        axes.bar_label(bars, fmt="%.1f%%", padding=3, fontsize=8)
    axes.set_yticks([place + height * (len(names) - 1) / 2 for place in range(len(policies))], policies)
    axes.invert_yaxis()
    axes.set_xlabel("padding, % of the computed tokens")
    axes.legend(title="workload")
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(f"Padding of a backlog, by policy\n{where}", loc="left")
    file = folder / "engine-padding.png"
    figure.savefig(file, dpi=DPI)
    plt.close(figure)
    return file
