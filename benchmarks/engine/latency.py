"""Open loop: texts arrive at Poisson times whatever became of those before; 5% are online, the others background.

Latency counts from the moment a text was due, so that a sender that is late, or a system that blocks it, hides nothing
(no coordinated omission). The same arrivals, drawn with a fixed seed, go to every system at the same rate. Loads are
shares of a capacity: texts/s of the saturated run. Two bases: a share of ours (everybody gets the same load), and of
the system's own (everybody is equally busy). A system that is offered more than it can do is marked as overloaded; its
figures then say how long the run was, not how fast it is.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.engine.process import Pool, System, Unavailable
from benchmarks.engine.rounds import say
from benchmarks.engine.texts import SEED, Workload

LOADS = (0.2, 0.5, 0.75, 0.8)
ONLINE_SHARE = 0.05
DRAIN_S = 10.0


def arrivals(rate: float, seconds: float, texts: int, seed: int = SEED) -> list[tuple[float, int, bool]]:
    """(due in seconds, which text, online?), deterministic."""
    chance = random.Random(f"{seed} {rate:.6f}")
    found = []
    due = chance.expovariate(rate)
    while due < seconds:
        found.append((due, chance.randrange(texts), chance.random() < ONLINE_SHARE))
        due += chance.expovariate(rate)
    return found


def percentile(values: Sequence[float], share: float) -> float | None:
    """The nearest rank; None without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def at_its_best(prefix: str, capacities: Mapping[str, float]) -> str:
    """The fastest form of a peer, empty when there is none: ours is then run in the same precision."""
    return max((name for name in capacities if name.startswith(prefix)), key=capacities.__getitem__, default="")


def measure(
    pool: Pool,
    workload: Workload,
    systems: Sequence[System],
    capacities: Mapping[str, float],
    seconds: float,
    loads: Sequence[float] = LOADS,
) -> list[dict[str, Any]]:
    """One row per system, basis and load; systems take turns at each load. The first system is ours."""
    working = [system for system in pool.start(systems) if system.name in capacities]
    rows = []
    for load in loads:
        for system in working:
            for basis in ("ours",) if system is working[0] else ("ours", "own"):
                base = working[0] if basis == "ours" else system
                rate = load * capacities[base.name]
                say(f"latency: {system.name} at {load:.0%} of {basis} capacity, {rate:,.0f} texts/s")
                try:
                    answer = _run(pool, system, workload, rate, seconds)
                except Unavailable as error:
                    pool.unavailable[f"{system.name}, open loop at {load:.0%}"] = str(error)
                    continue
                rows.append(_row(system, basis, load, rate, rate / capacities[system.name], answer))
    return rows


def _run(pool: Pool, system: System, workload: Workload, rate: float, seconds: float) -> dict[str, Any]:
    sent = arrivals(rate, seconds, len(workload.texts))
    return pool.worker(system).ask("open_loop", set=workload.name, arrivals=sent, drain_s=DRAIN_S)


def _row(
    system: System, basis: str, load: float, rate: float, own_load: float, answer: Mapping[str, Any]
) -> dict[str, Any]:
    found: dict[str, Any] = {"system": system.name, "basis": basis, "load": load, "rate_per_s": rate}
    found["own_load"] = own_load
    for kind in ("online", "background"):
        seconds = answer[f"{kind}_s"]
        found[f"{kind}_samples"] = len(seconds)
        for share in (0.5, 0.99):
            value = percentile(seconds, share)
            found[f"{kind}_ms_p{share * 100:.0f}"] = value * 1e3 if value is not None else None
    unfinished = sum(answer["unfinished"])
    found |= {"unfinished": unfinished, "failed": sum(answer["failed"])}
    found["overloaded"] = own_load >= 1 or unfinished > 0
    found["padding_share"] = answer["details"].get("padding_share")
    found["sender_late_ms_p99"] = answer["sender_late_s_p99"] * 1e3
    return found
