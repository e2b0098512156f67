"""Ours against other libraries that pip installs and that run this very model: same texts, same cores, caches off.

Each peer is used as its documentation shows it, in an environment of its own where its versions exclude ours.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engine.agreement import agreement
from benchmarks.engine.environments import export_onnx, python_of
from benchmarks.engine.process import OURS, Pool, System, Unavailable, entry
from benchmarks.engine.rounds import measure, ratio, row
from benchmarks.engine.texts import Workload

# Slower by an order of magnitude, whatever the machine: every fourth text by length is enough of it.
THIN = 4

NOT_TRIED = {
    "text-embeddings-inference": "a Rust server; no package on PyPI",
    "fastembed, light-embed": "they run ONNX files in ONNX Runtime, which is measured through infinity-emb",
    "vLLM": "its wheel on PyPI is for CUDA",
    "txtai": "it runs the modules of transformers, as sentence-transformers does",
}


@dataclass(frozen=True)
class Contender:
    """One system, in the precisions that it has.

    Attributes:
        name: in tables; the precision is added.
        module: under `systems/`.
        environment: the peer's; empty for ours.
        precisions: `half` becomes bf16 on a CPU and fp16 on a GPU.
        settings: for the module.
        options: for each call.
        quick: whether it is part of the quick mode.
        thin: whether it gets fewer texts.
        cpu_only: left out on a GPU.
    """

    name: str
    module: str
    environment: str = ""
    precisions: tuple[str, ...] = ("fp32", "half")
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    quick: bool = True
    thin: bool = False
    cpu_only: bool = False


CONTENDERS = (
    Contender("sluice torch", OURS, settings={"backend": "torch"}),
    Contender("sluice OpenVINO", OURS, settings={"backend": "openvino"}, cpu_only=True),
    Contender("sentence-transformers", "sentence_transformers_peer"),
    Contender("infinity-emb", "infinity_peer", "infinity-emb"),
    Contender("infinity-emb BetterTransformer", "infinity_peer", "infinity-emb-optimum"),
    Contender(
        "sentence-transformers OpenVINO",
        "sentence_transformers_peer",
        "sentence-transformers-openvino",
        settings={"backend": "openvino"},
        cpu_only=True,
        quick=False,
    ),
    Contender(
        "infinity-emb ctranslate2",
        "infinity_peer",
        "infinity-emb",
        ("fp32",),
        {"engine": "ctranslate2"},
        cpu_only=True,
        quick=False,
    ),
    Contender(
        "infinity-emb ONNX Runtime",
        "infinity_peer",
        "infinity-emb-optimum",
        ("fp32",),
        {"engine": "optimum"},
        cpu_only=True,
        quick=False,
    ),
    Contender(
        "embed-anything", "embed_anything_peer", "embed-anything", ("fp32",), thin=True, cpu_only=True, quick=False
    ),
    Contender(
        "transformers one by one",
        "plain_steps",
        options={"fp32": {"step": "naive"}, "half": {"step": "naive half"}},
        thin=True,
    ),
)


@dataclass
class Field:
    """Who takes part.

    Attributes:
        systems: by name, in the order of tables.
        precisions: by name.
        thin: names of those that get fewer texts.
        missing: who cannot, and why.
    """

    systems: dict[str, System] = field(default_factory=dict)
    precisions: dict[str, str] = field(default_factory=dict)
    thin: set[str] = field(default_factory=set)
    missing: dict[str, str] = field(default_factory=dict)


def gather(folder: Path, model: Path, device: str, *, install: bool, quick: bool) -> Field:
    """Makes the environments that are missing. Quick: the important ones, in half precision only."""
    found = Field()
    for contender in CONTENDERS:
        if (quick and not contender.quick) or (contender.cpu_only and device != "cpu"):
            continue
        for kind in contender.precisions:
            if quick and kind == "fp32":
                continue
            precision = {"half": "bf16" if device == "cpu" else "fp16"}.get(kind, kind)
            name = f"{contender.name} {precision}"
            try:
                found.systems[name] = _system(contender, name, kind, precision, folder, model, device, install)
            except Unavailable as error:
                found.missing[name] = str(error)
                continue
            found.precisions[name] = precision
            if contender.thin:
                found.thin.add(name)
    return found


def _system(
    contender: Contender, name: str, kind: str, precision: str, folder: Path, model: Path, device: str, install: bool
) -> System:
    python = Path(sys.executable)
    if contender.environment:
        python = python_of(contender.environment, folder.resolve(), install=install)
    settings = {"device": device, **contender.settings}
    if contender.module != "plain_steps":
        settings["precision"] = precision
    if settings.get("engine") == "optimum":
        settings["folder"] = str(export_onnx(python, model, folder.resolve() / "onnx"))
    return System(name, contender.module, python, settings, dict(contender.options.get(kind, {})))


def compare(
    pool: Pool, workloads: Sequence[Workload], who: Field, reference: System, rounds: int, until_s: Sequence[float]
) -> dict[str, Any]:
    """Throughput of all on each workload in one interleaved run; ours divided by theirs at the same precision."""
    working = pool.start(list(who.systems.values()))
    pool.unavailable |= who.missing | {f"{name} (not tried)": why for name, why in NOT_TRIED.items()}
    least = agreement(pool, working, reference, workloads[0].name)
    working = [system for system in working if system.name not in pool.unavailable]
    tables = []
    for workload, until in zip(workloads, until_s, strict=True):
        thin = workload.thin(THIN)
        entries = [entry(pool, each, thin if each.name in who.thin else workload) for each in working]
        results = measure(entries, rounds, title=f"peers, {workload.name}", until_s=until)
        rows = []
        for system in working:
            precision = who.precisions[system.name]
            found = row(system.name, results, first=working[0].name, before=None)
            found |= {"precision": precision, "cosine_min": least[system.name]}
            for ours in ("sluice torch", "sluice OpenVINO"):
                twin = f"{ours} {precision}"
                if twin in results and system.module != OURS:
                    found[f"{ours} is times"] = ratio(results[twin], results[system.name])._asdict()
            rows.append(found)
        plans = {name: each.details["plan"] for name, each in results.items() if "plan" in each.details}
        tables.append({"workload": workload.name, "rows": rows, "plans": plans})
    return {"tables": tables, "versions": pool.versions, "working": [system.name for system in working]}
