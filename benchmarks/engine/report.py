"""The result as markdown, ready for docs/engine.md."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.engine import machine


def render(result: Mapping[str, Any]) -> str:
    parts = ["# Engine benchmarks", machine.sentence(result["machine"]), _method(result)]
    parts += [_remedies(each) for each in result.get("remedies", [])]
    if found := result.get("components"):
        parts.append(_components(found))
    if found := result.get("padding"):
        parts.append(_padding(found))
    if found := result.get("peers"):
        parts += [_peers(each) for each in found["tables"]] + [_versions(found)]
    parts += [_latency(result["latency"])] if result.get("latency") else []
    parts += [_caches(each) for each in result.get("caches", [])]
    if result["unavailable"]:
        parts.append("## Not measured\n\n" + "\n".join(f"* {k}: {v}" for k, v in result["unavailable"].items()))
    return "\n\n".join(parts) + "\n"


def _method(result: Mapping[str, Any]) -> str:
    sets = "; ".join(
        f"`{each['name']}`: {each['texts']:,} texts, {each['tokens_mean']:.0f} tokens in the mean ({each['source']})"
        for each in result["workloads"]
    )
    return (
        f"Workloads: {sets}. All variants took turns, {result['rounds']} rounds; figures are medians, ratios medians "
        "of the ratios of each round, by real tokens per second, with the least and the greatest in brackets. "
        f"Mode: {result['mode']}."
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column is text, the others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def times(found: Mapping[str, float] | None) -> str:
    if not found:
        return ""
    if found["low"] == found["high"]:
        return f"{found['median']:.2f}"
    return f"{found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f})"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _remedies(section: Mapping[str, Any]) -> str:
    rows = [
        (
            row["name"] if row["kept"] else f"*{row['name']}*",
            f"{row['texts_per_s']['median']:,.0f}",
            f"{row['tokens_per_s']['median']:,.0f}",
            percent(row["padding_share"]),
            times(row["ratio_to_first"]),
            times(row["ratio_to_before"]),
        )
        for row in section["rows"]
    ]
    head = ("remedy", "texts/s", "tokens/s", "padding", "times naive", "times the row before")
    aside = (
        f"Rows in italics are shown and not kept: the next one is compared with the last that was. The engine's rows "
        f"run in {section['precision']}, the faster here."
    )
    return f"## Remedies, one at a time: {section['workload']}\n\n{table(head, rows)}\n\n{aside}"


def _components(found: Mapping[str, Any]) -> str:
    parts = [
        f"## Components\n\nMedian of the same work; a batch is {found['batch'][0]} rows of {found['batch'][1]} tokens."
    ]
    for group, seconds in found["seconds"].items():
        first = next(iter(seconds.values()))
        rows = [(name, f"{each * 1e3:,.2f}", f"{first / each:.2f}") for name, each in seconds.items()]
        what = f"{group}, {found['texts']:,} texts" if group == "tokenizer" else group
        parts.append(table((what, "ms", "times the first"), rows))
    parts += [f"{name}: {why}." for name, why in found["skipped"].items()]
    return "\n\n".join(parts)


def _padding(found: Mapping[str, Mapping[str, float]]) -> str:
    names = list(found)
    policies = list(dict.fromkeys(policy for shares in found.values() for policy in shares))
    rows = [(policy, *(percent(found[name].get(policy)) for name in names)) for policy in policies]
    return f"## Padding share of a backlog, by policy\n\n{table(('policy', *names), rows)}"


def _peers(section: Mapping[str, Any]) -> str:
    rows = [
        (
            row["name"],
            f"{row['texts_per_s']['median']:,.0f}",
            f"{row['tokens_per_s']['median']:,.0f}",
            times(row.get("sluice torch is times")),
            times(row.get("sluice OpenVINO is times")),
            f"{row['cosine_min']:.5f}" if row["cosine_min"] is not None else "",
        )
        for row in section["rows"]
    ]
    head = ("system", "texts/s", "tokens/s", "sluice torch is times", "sluice OpenVINO is times", "cosine, least")
    note = "Caches are off. Ratios compare systems of the same precision; cosines are to plain transformers in fp32."
    return f"## Peers: {section['workload']}\n\n{table(head, rows)}\n\n{note}"


def _versions(found: Mapping[str, Any]) -> str:
    environments: dict[str, list[str]] = {}
    for name in found["working"]:
        if versions := found["versions"].get(name):
            what = ", ".join(f"{package} {version}" for package, version in versions.items())
            environments.setdefault(what, []).append(name)
    lines = [f"* {', '.join(names)}: {what}" for what, names in environments.items()]
    return "Versions, by environment:\n\n" + "\n".join(lines)


def _latency(rows: Sequence[Mapping[str, Any]]) -> str:
    def ms(value: float | None) -> str:
        return "" if value is None else f"{value:,.0f}"

    body = [
        (
            f"{row['system']}{' (overloaded)' if row['overloaded'] else ''}",
            f"{row['load']:.0%} of {row['basis']}",
            f"{row['rate_per_s']:,.0f}",
            f"{row['own_load']:.0%}",
            ms(row["online_ms_p50"]),
            ms(row["online_ms_p99"]),
            ms(row["background_ms_p50"]),
            ms(row["background_ms_p99"]),
            f"{row['online_samples']:,}",
            f"{row['sender_late_ms_p99']:.1f}",
        )
        for row in rows
    ]
    head = (
        "system", "load", "texts/s", "of its own capacity", "online p50 ms", "online p99 ms", "background p50 ms",
        "background p99 ms", "online samples", "sender late p99 ms",
    )  # fmt: skip
    note = (
        "Open loop: single texts at Poisson times, 5% online among background ones, counted from when they were due. "
        "`ours` is the capacity of the first system here, `own` the system's own (texts/s of the saturated run). The "
        "peer is infinity-emb in its fastest form here; it has no priorities. A text not answered 10 s after the last "
        "arrival counts with what it had waited by then; who was offered more than it can do is marked as overloaded."
    )
    return f"## Latency under load\n\n{table(head, body)}\n\n{note}"


def _caches(found: Mapping[str, Any]) -> str:
    base = found["rows"].get("caches off", {}).get("texts_per_s", 0.0)
    rows = [
        (name, f"{row['texts_per_s']:,.0f}", f"{row['texts_per_s'] / base:.2f}" if base else "", str(row["computed"]))
        for name, row in found["rows"].items()
    ]
    head = ("caches", "texts/s", "times without", "texts computed")
    distinct = f"{found['distinct_share']:.1%} of the texts are distinct"
    note = f"{distinct}. One pass each, not interleaved: a pass changes what the next one finds."
    return f"## What the caches add: {found['workload']}\n\n{table(head, rows)}\n\n{note}"
