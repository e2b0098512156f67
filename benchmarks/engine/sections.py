"""What is measured, section by section; each returns plain data for the report.

`remedies`: from naive to everything, one remedy at a time. `caches`: what they add. `components` and `padding`: the
seed's own table, and the policies' padding. Peers and latency have modules of their own.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.engine import padding
from benchmarks.engine.agreement import agreement
from benchmarks.engine.process import OURS, Pool, System, entry
from benchmarks.engine.rounds import measure, ratio, row, say
from benchmarks.engine.texts import Workload

# Slower by an order of magnitude: they get every fourth text by length, and ratios are taken by tokens.
THIN = 4

STEPS = [
    ("naive", "one by one: single tokenizer, dynamic masks, fp32"),
    ("batches", "batches of 32 as they come, padded"),
    ("tokenizer", "+ batched tokenizer"),
    ("classic", "+ length buckets 32/64/128/256"),
    ("ladder", "+ fine ladder, 1,024-token budget"),
    ("masks", "+ precomputed masks, none for full batches"),
    ("fused", "+ fused projections"),
    ("half", "+ half precision"),
    ("cached", "(cached tokens instead, second pass, fp32)"),
]
SLOW = {"naive", "batches", "tokenizer"}


def step_systems(device: str) -> list[System]:
    settings = {"device": device}
    return [System(label, "plain_steps", settings=settings, options={"step": name}) for name, label in STEPS]


# The engine's own switches, one at a time; each is laid over the one before. OpenVINO stands beside torch at the end.
OPENVINO = "OpenVINO instead of torch,"
LANES = "+ lanes and threads as measured"


def engine_systems(precision: str, device: str) -> list[System]:
    ladder: list[tuple[str, dict[str, Any]]] = [
        (
            "+ the engine: queue, tokenising beside computing",
            {"backend": "torch", "packing": "off", "prepack": "off", "workers": 1, "worker_kind": "thread"},
        ),
        ("+ packing: no padding is computed", {"packing": "auto"}),
        ("+ prepacked weights", {"prepack": "auto"}),
        (LANES, {"workers": 0, "worker_kind": "auto"}),
    ]
    if device == "cpu":
        ladder += [
            (f"{OPENVINO} fp32", {"backend": "openvino", "precision": "fp32"}),
            (f"{OPENVINO} bf16", {"precision": "bf16"}),
        ]
    settings: dict[str, Any] = {"precision": precision, "device": device}
    systems = []
    for name, change in ladder:
        settings = {**settings, **change}
        systems.append(System(name, OURS, settings=settings))
    return systems


def remedies(pool: Pool, workload: Workload, rounds: int, device: str, until_s: float) -> dict[str, Any]:
    steps = pool.start(step_systems(device))
    labels = dict(STEPS)
    half_wins, precision = _half_wins(pool, steps, workload, device)
    engines = pool.start(engine_systems(precision, device))
    systems = [*steps, *engines]
    least = agreement(pool, systems, steps[0], workload.name)
    systems = [system for system in systems if system.name not in pool.unavailable]
    slow = {labels[name] for name in SLOW}
    thin = workload.thin(THIN)
    entries = [entry(pool, system, thin if system.name in slow else workload) for system in systems]
    results = measure(entries, rounds, title=f"remedies, {workload.name}", until_s=until_s)
    rows, before = [], None
    aside = {labels["cached"]} | (set() if half_wins else {labels["half"]})
    for system in systems:
        base = labels["fused"] if system.name == labels["cached"] else before
        beside = system.name.startswith(OPENVINO)
        found = row(system.name, results, first=labels["naive"], before=base)
        found |= {"kept": system.name not in aside, "cosine_min": least.get(system.name)}
        rows.append(found)
        if system.name not in aside and not beside:
            before = system.name
    plans = {name: each.details["plan"] for name, each in results.items() if "plan" in each.details}
    for system in engines:
        pool.stop(system)
    return {"workload": workload.name, "precision": precision, "rows": rows, "plans": plans}


def _half_wins(pool: Pool, steps: Sequence[System], workload: Workload, device: str) -> tuple[bool, str]:
    """Whether half precision is faster here, from three quick turns on a small set; what the engine then runs in."""
    half_name = "fp16" if device.startswith("cuda") else "bf16"
    small = workload.thin(THIN)
    labels = dict(STEPS)
    pair = [system for system in steps if system.name in {labels["fused"], labels["half"]}]
    results = measure([entry(pool, system, small) for system in pair], 3, title="precision")
    wins = ratio(results[labels["half"]], results[labels["fused"]]).median > 1
    return wins, half_name if wins else "fp32"


def caches(pool: Pool, workload: Workload, precision: str, device: str) -> dict[str, Any]:
    """What token and result cache add on one workload: first pass (cold), second pass (all known). Not interleaved:
    a pass changes what the next one finds."""
    settings = {"precision": precision, "device": device}
    without = System("caches off", OURS, settings=settings)
    results: dict[str, Any] = {"distinct_share": len(set(workload.texts)) / len(workload.texts)}
    variants = {
        "token cache": {"token_bytes_max": 64 << 20, "result_bytes_max": 0},
        "token and result cache": {"token_bytes_max": 64 << 20, "result_bytes_max": 256 << 20},
    }
    passes: list[tuple[str, System]] = [("caches off", without)]
    for name, tree in variants.items():
        system = System(name, OURS, settings={**settings, "caches": tree})
        passes += [(f"{name}, first pass", system), (f"{name}, second pass", system)]
    working = {system.name for system in pool.start([system for _, system in passes])}
    rows = {}
    for label, system in passes:
        if system.name in working:
            seconds, details = entry(pool, system, workload).run()
            rows[label] = {"texts_per_s": len(workload.texts) / seconds, "computed": details.get("texts_computed")}
    for _, system in passes:
        pool.stop(system)
    return {**results, "rows": rows}


def components(pool: Pool, workload: Workload, rounds: int, device: str) -> dict[str, Any]:
    say("components: masks, tokenizer, precision")
    system = step_systems(device)[0]
    return dict(pool.worker(system).ask("micro", set=workload.name, rounds=rounds)["micro"])


def padding_shares(workload: Workload) -> dict[str, float]:
    from engine.config import LADDER

    return padding.policies(workload.lengths, [edge for edge in LADDER if edge <= 256], budget=1024)
