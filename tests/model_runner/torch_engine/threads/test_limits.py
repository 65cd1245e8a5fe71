"""Quotas of control groups, in file systems of our own."""

import math
import os
from pathlib import Path

import pytest

from moebeam.model_runner.torch_engine.threads.limits import count_usable_cores, read_quota_cores

V1 = "4:memory:/pods/a\n2:cpu,cpuacct:/pods/a\n0::/\n"
V1_SPLIT = "5:cpuset:/\n2:cpuacct:/\n1:cpu:/pods/a\n"
V2 = "0::/pods/a\n"


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        (V2, {"pods/a/cpu.max": "150000 100000\n"}, 1.5),
        (V2, {"pods/a/cpu.max": "max 100000\n"}, math.inf),
        (V2, {"pods/a/cpu.max": "max 100000\n", "pods/cpu.max": "300000 100000\n"}, 3.0),
        (V2, {"pods/a/cpu.max": "400000 100000\n", "pods/cpu.max": "300000 100000\n"}, 3.0),
        (V2, {"cpu.max": "50000 100000\n"}, 0.5),
        (V2, {"pods/a/cpu.max": "nonsense\n"}, math.inf),
        (V2, {"unified/pods/a/cpu.max": "200000 100000"}, 2.0),
        (V1, {"cpu,cpuacct/pods/a/cpu.cfs_quota_us": "250000", "cpu,cpuacct/pods/a/cpu.cfs_period_us": "100000"}, 2.5),
        (V1, {"cpu,cpuacct/pods/a/cpu.cfs_quota_us": "-1", "cpu,cpuacct/pods/a/cpu.cfs_period_us": "100000"}, math.inf),
        (V1, {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1.0),
        (V1_SPLIT, {"cpu/pods/a/cpu.cfs_quota_us": "50000", "cpu/pods/a/cpu.cfs_period_us": "50000"}, 1.0),
        (V1_SPLIT, {"cpu/pods/b/cpu.cfs_quota_us": "50000", "cpu/pods/b/cpu.cfs_period_us": "50000"}, math.inf),
    ],
)
def test_quota_is_the_least_of_the_process_groups_and_those_above(
    groups: str, files: dict[str, str], cores: float, tmp_path: Path
) -> None:
    write(tmp_path / "proc/self/cgroup", groups)
    for name, content in files.items():
        write(tmp_path / "sys/fs/cgroup" / name, content)
    assert read_quota_cores(tmp_path) == cores


@pytest.mark.parametrize(
    ("quota", "cores"), [("max", 8), ("800000", 8), ("150000", 2), ("100500", 1), ("10000", 1), ("9900000", 8)]
)
def test_started_core_of_a_quota_counts_within_the_affinity(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    write(tmp_path / "proc/self/cgroup", V2)
    write(tmp_path / "sys/fs/cgroup/pods/a/cpu.max", f"{quota} 100000\n")
    assert count_usable_cores(tmp_path) == cores


def test_machine_without_groups_and_affinities_has_all_its_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert count_usable_cores(tmp_path) == 12


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
