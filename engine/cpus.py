"""How many CPUs this process may use: those that it is allowed to run on, and the time that its control groups allow.

A container with a quota of two CPUs (`--cpus 2`, Kubernetes' limits, systemd's CPUQuota) on a machine of 64 may run on
all of them, but has the time of two: with 64 threads it would stand still for most of every tenth of a second. The
quota is that of the process' control group and of all groups around it, in either version of control groups.

Fails: never; what cannot be read is no quota.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

MEMBERSHIP: Final = Path("/proc/self/cgroup")
GROUPS: Final = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Cpus:
    """See the module's docstring.

    Attributes:
        allowed: the CPUs that this process may run on, ascending.
        quota: CPUs whose time it may use; infinity for no limit.
    """

    allowed: tuple[int, ...]
    quota: float = math.inf

    @property
    def count(self) -> int:
        """Threads that can compute side by side: a part of a CPU counts as one."""
        return max(1, math.ceil(min(self.quota, len(self.allowed))))

    @property
    def limited(self) -> bool:
        """Whether the quota is the limit: then no thread is tied to a CPU, since others run on the same ones."""
        return self.count < len(self.allowed)

    @property
    def reason(self) -> str:
        """For `sluice engine plan`."""
        allowed = len(self.allowed)
        return f"{self.count} of {allowed} CPUs are allowed (quota)" if self.limited else f"{allowed} CPUs are allowed"


def usable_cpus() -> Cpus:
    """Those of this process, now."""
    return Cpus(tuple(sorted(os.sched_getaffinity(0))), quota(MEMBERSHIP, GROUPS))


def quota(membership: Path, groups: Path) -> float:
    """CPUs whose time a process may use; infinity for no limit.

    Args:
        membership: the process' `/proc/PID/cgroup`.
        groups: where control groups are mounted.
    """
    least = math.inf
    for line in _read(membership).splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounted = groups / "cpu" if controllers else groups
        group = PurePosixPath(path.lstrip("/"))
        # A container may see the path that its group has on the host: what is not there is no limit.
        for place in (group, *group.parents):
            least = min(least, _own(mounted / place, version=1 if controllers else 2))
    return least


def _own(group: Path, version: int) -> float:
    """What one group allows."""
    if version == 1:
        words = [_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")]
    else:
        words = _read(group / "cpu.max").split()
    try:
        quota_us, period_us = map(int, words)
    except (ValueError, OverflowError):  # "max", no such file, or no number of this world
        return math.inf
    return quota_us / period_us if quota_us > 0 and period_us > 0 else math.inf


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
