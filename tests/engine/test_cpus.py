"""How many CPUs a process may use: what control groups say, in both versions, and nothing where they say nothing."""

import math
from pathlib import Path

import pytest

from engine.cpus import Cpus, quota, usable_cpus

V1 = "3:cpuset:/\n2:cpu,cpuacct:/box\n1:name=systemd:/other\n0::/\n"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "800000 100000", "a/b/cpu.max": "50000 100000", "cpu.max": "max 100000"}, 0.5),
        ("0::/the/hosts/path\n", {"cpu.max": "400000 100000"}, 4.0),
        (V1, {"cpu/box/cpu.cfs_quota_us": "300000", "cpu/box/cpu.cfs_period_us": "100000"}, 3.0),
        (V1, {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "50000"}, 5.0),
        (V1, {"cpu/box/cpu.cfs_quota_us": "-1", "cpu/box/cpu.cfs_period_us": "100000"}, math.inf),
        ("", {"cpu.max": "200000 100000"}, math.inf),
        ("nonsense\n\n0::/\n", {"cpu.max": "much"}, math.inf),
        ("0::/\n", {"cpu.max": "0 0"}, math.inf),
        ("0::/\n", {}, math.inf),
    ],
)
def test_the_least_quota_of_all_groups_around_counts(
    tmp_path: Path, membership: str, files: dict[str, str], expected: float
) -> None:
    (tmp_path / "member").write_text(membership)
    for name, content in files.items():
        file = tmp_path / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    assert quota(tmp_path / "member", tmp_path / "groups") == expected


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert quota(tmp_path / "absent", tmp_path) == math.inf


@pytest.mark.parametrize(
    ("quota", "count", "reason"),
    [
        (math.inf, 8, "8 CPUs are allowed"),
        (9.5, 8, "8 CPUs are allowed"),
        (7.5, 8, "8 CPUs are allowed"),
        (2.0, 2, "2 of 8 CPUs are allowed (quota)"),
        (1.2, 2, "2 of 8 CPUs are allowed (quota)"),
        (0.1, 1, "1 of 8 CPUs are allowed (quota)"),
    ],
)
def test_a_part_of_a_cpu_counts_as_one(quota: float, count: int, reason: str) -> None:
    cpus = Cpus(tuple(range(8)), quota)
    assert (cpus.count, cpus.reason) == (count, reason)


def test_this_process_may_use_a_cpu() -> None:
    assert 1 <= usable_cpus().count <= len(usable_cpus().allowed)
