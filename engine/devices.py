"""Which devices a model runs on, and opening them: lanes of one process, or worker processes.

* Several GPUs: a worker process each, since one interpreter cannot launch for all of them. A single one is driven in
  this process. When its CUDA context dies, this process cannot use it any more, and a worker process takes over; the
  next model (a swap) is opened in one too.
* Several NUMA nodes: a worker process each, pinned to the node's CPUs, whose memory it then uses.
* Else a CPU is divided into lanes by measurement (`lanes`): threads on one copy of the weights. Worker processes of
  one thread cost a copy of everything each; they are tried where they could be clearly faster.

Fails: what opening a backend raises (`Permanent`, `ConfigError`); what was opened before is closed.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec

from engine import lanes, models
from engine.backend import Backend, BackendInfo, Reopen
from engine.backends import open_backend
from engine.config import EngineConfig
from engine.cpus import Cpus, usable_cpus
from engine.models import ModelCard
from engine.remote import RemoteBackend, ReopenWorker, WorkerSpec, open_workers
from sluice.errors import Retryable, SluiceError

# How much faster worker processes must be than lanes of this process: they cost a copy of model and libraries each.
PROCESS_GAIN_MIN: Final = 1.15
# On fewer CPUs they are not tried: starting them takes longer than what they could gain is worth.
PROCESS_CPUS_MIN: Final = 8
NODES: Final = Path("/sys/devices/system/node")
# Of the probe that lanes and processes are compared by: rows, and tokens of each.
_PROBE: Final = (16, 48)


@dataclass(frozen=True, slots=True)
class Opened:
    """An open backend.

    Attributes:
        name: unique.
        backend: of the device.
        reopen: opens it anew after it died, in a process of its own; None where that cannot help.
    """

    name: str
    backend: Backend
    reopen: Reopen | None = None


def open_devices(config: EngineConfig, card: ModelCard, reasons: dict[str, str]) -> list[Opened]:
    """Opens all devices of a model; at least one. The first is driven by the calling thread, if it is in this process.

    Raises:
        Permanent: the model is damaged, or of no use.
        ConfigError: a device is not there.
    """
    names = _names(config)
    # Here, since a backend is asked for by the device's name, whoever chose it.
    reasons["device"] = f"{', '.join(names)}: {_why(config, names)}"
    if any(name != "cpu" for name in names):
        return _accelerators(config, card, reasons, names)
    return _cpus(config, card, reasons, len(names) if len(names) > 1 else config.workers)


def numa_nodes(allowed: Sequence[int], root: Path = NODES) -> list[tuple[int, ...]]:
    """The CPUs of each NUMA node, as far as they are allowed; one entry when the system does not say."""
    usable = set(allowed)
    nodes = []
    for file in sorted(root.glob("node[0-9]*/cpulist"), key=lambda file: int(file.parent.name[4:])):
        cpus = tuple(cpu for cpu in _cpu_list(file.read_text(encoding="ascii")) if cpu in usable)
        if cpus:
            nodes.append(cpus)
    return nodes or [tuple(sorted(usable))]


def _cpu_list(text: str) -> list[int]:
    """`0-3,8` as numbers, as Linux writes sets of CPUs."""
    found: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found += range(int(first), int(last or first) + 1)
    return found


def _names(config: EngineConfig) -> list[str]:
    """The devices wanted: as configured, or all GPUs that are there, or the CPU."""
    if config.devices:
        return list(config.devices)
    if config.device == "cpu":
        return ["cpu"]
    if config.device not in {"auto", "cuda"}:
        return [config.device]
    import torch

    # Asks the driver, and makes no context.
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cuda" and count <= 1:
        return ["cuda"]
    return [f"cuda:{index}" for index in range(count)] or ["cpu"]


def _why(config: EngineConfig, names: Sequence[str]) -> str:
    if config.devices or config.device != "auto":
        return "configured"
    return "no CUDA device is there" if names == ["cpu"] else "all GPUs that are there"


def _accelerators(config: EngineConfig, card: ModelCard, reasons: dict[str, str], names: Sequence[str]) -> list[Opened]:
    in_process = config.worker_kind == "thread" or (len(names) == 1 and config.worker_kind == "auto")
    if not in_process:
        specs = [_spec(_on(config, name), card) for name in names]
        reasons["devices"] = f"{', '.join(names)}: a worker process each"
        return _workers(specs, names, reasons)
    reasons["devices"] = f"{', '.join(names)}: in this process; a worker process takes over when it dies"
    opened: list[Opened] = []
    try:
        opened.extend(_accelerator(_on(config, name), card, reasons, name) for name in names)
    except BaseException:
        _close(opened)
        raise
    return _distinct(opened)


def _accelerator(config: EngineConfig, card: ModelCard, reasons: dict[str, str], name: str) -> Opened:
    """One in this process; in a worker process, where the context that a model before left behind is dead."""
    spec = _spec(config, card)
    try:
        backend = open_backend(config, card, reasons)
    except (Retryable, RuntimeError) as error:
        told = str(error).lower()
        if "cuda error" not in told or "out of memory" in told:
            raise
        (worker,) = _workers([spec], [name], reasons)
        reasons["devices"] = f"{name}: a worker process, since this process cannot use it: {models.in_short(error)}"
        return worker
    return Opened(name, backend, ReopenWorker(_like(spec, backend.info, reasons)))


def _cpus(config: EngineConfig, card: ModelCard, reasons: dict[str, str], wanted: int) -> list[Opened]:
    """The CPU, divided.

    Args:
        config: the engine's section.
        card: of the model.
        reasons: takes what is decided.
        wanted: parts; 0: by measurement.
    """
    config = _on(config, "cpu")
    cpus = usable_cpus()
    # The time of a few CPUs is not divided by nodes.
    nodes = [cpus.allowed] if cpus.limited else numa_nodes(cpus.allowed)
    threads = config.threads or cpus.count
    if config.worker_kind == "process":
        if not wanted and len(nodes) > 1:
            return _node_workers(config, card, reasons, nodes)
        return _cpu_workers(config, card, reasons, wanted or threads, threads, cpus)
    if config.worker_kind == "auto" and not wanted and len(nodes) > 1:
        return _node_workers(config, card, reasons, nodes)
    return _lanes(config, card, reasons, wanted, threads, cpus)


def _lanes(
    config: EngineConfig, card: ModelCard, reasons: dict[str, str], wanted: int, threads: int, cpus: Cpus
) -> list[Opened]:
    """Lanes of this process, or worker processes where those are measured clearly faster."""
    backend, first, pins = open_backend(config, card, reasons), cpus.allowed[:threads], not cpus.limited
    opened = divided(backend, reasons, wanted, threads, first, config.fit_seconds_max, pins=pins)
    if len(opened) > 1 and config.worker_kind == "auto" and not wanted and len(first) >= PROCESS_CPUS_MIN:
        return _try_processes(config, card, reasons, opened, cpus, len(first))
    return opened


def divided(
    backend: Backend,
    reasons: dict[str, str],
    wanted: int,
    threads: int,
    cpus: Sequence[int],
    seconds_max: float,
    clock: Callable[[], float] = time.perf_counter,
    *,
    pins: bool = True,
) -> list[Opened]:
    """The backend as it is, or lanes that share its weights in its place.

    Args:
        backend: of the CPU; closed when lanes take its place.
        reasons: takes what is decided.
        wanted: lanes; 0: by measurement, which may also pin them.
        threads: of all lanes together.
        cpus: that lanes are measured on, and pinned to where that paid.
        seconds_max: time for measuring.
        clock: monotonic seconds.
        pins: whether lanes may be pinned.
    """
    if wanted == 1 or not isinstance(backend, lanes.Twinned):
        reasons["lanes"] = "1: configured" if wanted == 1 else "1: this backend does not share its weights"
        return [Opened("cpu", backend)]
    if wanted:
        plan = lanes.LanePlan(wanted, max(1, threads // wanted), False, f"{wanted}: configured")
    else:
        plan = lanes.choose_lanes(backend, cpus, seconds_max, clock, pins=pins)
    reasons["lanes"] = plan.reason
    if plan.lanes == 1:
        return [Opened("cpu", backend)]
    twins = [backend.twin(plan.threads, plan.cpus(lane, cpus)) for lane in range(plan.lanes)]
    # The twins hold the weights now.
    backend.close()
    return [Opened(f"cpu/{lane}", each) for lane, each in enumerate(twins)]


def _try_processes(
    config: EngineConfig, card: ModelCard, reasons: dict[str, str], opened: list[Opened], cpus: Cpus, count: int
) -> list[Opened]:
    """The lanes, or `count` worker processes of one thread each where those are clearly faster."""
    backends = [each.backend for each in opened]
    single = opened[0].backend.twin(1)  # type: ignore[attr-defined] # lanes are twins
    alone, together = tokens_per_s([single]), tokens_per_s(backends)
    single.close()
    # Processes of one thread are at best as fast as if each were alone.
    bound = alone * count / max(together, 1e-9)
    if bound < PROCESS_GAIN_MIN:
        reasons["workers"] = f"none: worker processes could be at most {bound:.2f} times as fast as these lanes"
        return opened
    notes: dict[str, str] = {}
    workers: list[Opened] = []
    try:
        workers = _cpu_workers(config, card, notes, count, count, cpus)
        gain = tokens_per_s([each.backend for each in workers]) / max(tokens_per_s(backends), 1e-9)
    except SluiceError as error:
        # Most likely memory: each has a copy of everything.
        _close(workers)
        reasons["workers"] = f"none: {count} worker processes were tried: {error}"
        return opened
    if gain < PROCESS_GAIN_MIN:
        _close(workers)
        reasons["workers"] = f"none: {count} worker processes were {gain:.2f} times as fast as these lanes"
        return opened
    _close(opened)
    reasons.update(notes)
    reasons["workers"] = f"{count} processes of one thread: {gain:.2f} times as fast as lanes of one process"
    return workers


def tokens_per_s(
    backends: Sequence[Backend], seconds: float = 0.5, clock: Callable[[], float] = time.perf_counter
) -> float:
    """What several backends compute side by side, each driven by a thread of its own, in about `seconds` seconds."""
    import numpy as np

    rows, length = _PROBE[0], min(_PROBE[1], *(backend.info.length_max for backend in backends))
    batch = [np.arange(length, dtype=np.int32) % 50 + 1] * rows

    def drive(backend: Backend, seconds: float) -> float:
        begun, done = clock(), 0
        while not done or clock() - begun < seconds:
            backend.collect(backend.submit(batch, length))
            done += 1
        return done * rows * length / (clock() - begun)

    with ExitStack() as stack:
        # A lane keeps to its thread; the first round warms up.
        threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in backends]
        for duration in (0.0, seconds):
            running = [thread.submit(drive, each, duration) for thread, each in zip(threads, backends, strict=True)]
            rates = [each.result() for each in running]
    return sum(rates)


def _node_workers(
    config: EngineConfig, card: ModelCard, reasons: dict[str, str], nodes: Sequence[tuple[int, ...]]
) -> list[Opened]:
    reasons["devices"] = f"{len(nodes)} NUMA nodes: a worker process each, pinned to its CPUs"
    specs = node_specs(config, card, nodes)
    opened = _workers(specs, [f"cpu/node{index}" for index in range(len(nodes))], reasons)
    reasons["threads"] = _threads_reason(config, specs, f"{sum(map(len, nodes))} CPUs are allowed")
    return opened


def node_specs(config: EngineConfig, card: ModelCard, nodes: Sequence[tuple[int, ...]]) -> list[WorkerSpec]:
    """A worker on the CPUs of each node; `engine.threads` is what all of them have together."""
    share = max(1, config.threads // len(nodes))
    return [_spec(config, card, min(share, len(cpus)) if config.threads else len(cpus), cpus) for cpus in nodes]


def _cpu_workers(
    config: EngineConfig,
    card: ModelCard,
    reasons: dict[str, str],
    count: int,
    threads: int,
    cpus: Cpus,
) -> list[Opened]:
    each = max(1, threads // count)
    reasons["devices"] = f"{count} worker processes of {each} threads"
    shares = [cpus.allowed[place * each : (place + 1) * each] for place in range(count)]
    fits = count * each <= len(cpus.allowed) and not cpus.limited
    specs = [_spec(config, card, each, share if fits else ()) for share in shares]
    opened = _workers(specs, [f"cpu/{place}" for place in range(count)], reasons)
    reasons["threads"] = _threads_reason(config, specs, cpus.reason)
    return opened


def _threads_reason(config: EngineConfig, specs: Sequence[WorkerSpec], found: str) -> str:
    """The workers were told how many, and do not know why."""
    threads = sorted({spec.arguments["threads"] for spec in specs})
    why = f"{config.threads} are configured" if config.threads else found
    return f"{' or '.join(map(str, threads))} in each worker process: {why}"


def _workers(specs: Sequence[WorkerSpec], names: Sequence[str], reasons: dict[str, str]) -> list[Opened]:
    """Opens the first, which decides by measurement what is left open, then the others like it, side by side."""
    first = RemoteBackend(specs[0])
    reasons.update(first.reasons)
    same = [_like(spec, first.info, first.reasons) for spec in specs]
    try:
        backends = [first, *open_workers(same[1:])]
    except BaseException:
        first.close()
        raise
    return _distinct(
        [Opened(name, backend, ReopenWorker(spec)) for name, backend, spec in zip(names, backends, same, strict=True)]
    )


def _spec(config: EngineConfig, card: ModelCard, threads: int = 0, cpus: tuple[int, ...] = ()) -> WorkerSpec:
    return WorkerSpec(
        opener="engine.worker:open_model",
        arguments={"config": msgspec.to_builtins(config), "folder": str(card.folder), "threads": threads},
        cpus=cpus,
        start_s_max=config.worker_start_s_max,
        answer_s_max=config.worker_answer_s_max,
    )


def _like(spec: WorkerSpec, info: BackendInfo, reasons: Mapping[str, str]) -> WorkerSpec:
    """The same with what another one chose: a text's result must not depend on where it ran."""
    chosen: dict[str, str] = {"precision": info.precision}
    backend = reasons.get("backend", "").partition(":")[0]
    if backend in {"torch", "openvino"}:
        chosen["backend"] = backend
    return replace(spec, arguments={**spec.arguments, "config": {**spec.arguments["config"], **chosen}})


def _on(config: EngineConfig, device: str) -> EngineConfig:
    """The section for one device."""
    return msgspec.structs.replace(config, device=device, devices=(), models={})


def _distinct(opened: Sequence[Opened]) -> list[Opened]:
    """With a number behind names that occur twice."""
    names = [each.name for each in opened]
    return [
        each if names.count(each.name) == 1 else Opened(f"{each.name}/{place}", each.backend, each.reopen)
        for place, each in enumerate(opened)
    ]


def _close(opened: Sequence[Opened]) -> None:
    for each in opened:
        each.backend.close()
