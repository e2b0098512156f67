"""What figures belong to: the machine, its state, versions."""

import datetime as dt
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
PACKAGES = ("torch", "transformers", "tokenizers", "sentence-transformers", "openvino", "numpy")


def describe(threads: int, *, passive: bool) -> dict[str, Any]:
    import psutil

    from sluice import __version__

    cpu = _cpu_info()
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "omp_wait_policy": "PASSIVE for all systems" if passive else "as each library sets it",
        "flags": [flag for flag in FLAGS if flag in cpu.get("flags", "").split()],
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "load_1min": round(psutil.getloadavg()[0], 1),
        "gpu": gpu(),
        "python": platform.python_version(),
        "sluice": __version__,
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def gpu() -> str:
    """The first CUDA device's name, or empty."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


def short(where: dict[str, Any]) -> str:
    """For the titles of plots."""
    cpu = re.sub(r"\((R|TM)\)|CPU|Processor|@.*", "", where["cpu"])
    return where["gpu"] or f"{' '.join(cpu.split())}, {where['threads']} threads"


def sentence(where: dict[str, Any]) -> str:
    """For the head of the tables."""
    device = where["gpu"] or "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return (
        f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads for each system, "
        f"{' '.join(where['flags']) or 'no vector flags known'}, {where['memory_gib']} GiB, {device}; load before the "
        f"run {where['load_1min']}; OMP_WAIT_POLICY: {where['omp_wait_policy']}; {where['date']}; Python "
        f"{where['python']}, sluice {where['sluice']}, {versions}."
    )


def _cpu_info() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    found: dict[str, str] = {}
    for key, _, value in pairs:
        found.setdefault(key.strip(), value.strip())
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
