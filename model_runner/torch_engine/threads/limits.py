"""How many cores this process may use: affinity, and the quotas of its control groups.

The kernel's documents cgroup-v1/cpu and cgroup-v2 ("CPU interface files") define the quota files.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

_NO_QUOTA = math.inf


def count_usable_cores(root: Path = Path("/")) -> int:
    """Cores that the scheduler lets this process have; a started core of a quota counts as one, and one is the least.

    Args:
        root: of the file system, below which `proc` and `sys` are read; where they are missing there are no quotas.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no affinities of processes
        cores = os.cpu_count() or 1
    return max(1, min(cores, _round_up(read_quota_cores(root))))


def read_quota_cores(root: Path = Path("/")) -> float:
    """The least quota of the control groups that this process is in, in cores; infinity if there is none."""
    quotas = (_read_quota(folder) for folder in _group_folders(root))
    return min(quotas, default=_NO_QUOTA)


def _group_folders(root: Path) -> Iterator[Path]:
    """This process's groups that may have a quota, and all groups above them, whose quotas hold for it, too.

    Inside a container the paths may be those of the host, of which only the mounted root exists here.
    """
    mount = root / "sys" / "fs" / "cgroup"
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            bases = [mount, mount / "unified"]
        elif "cpu" in controllers.split(","):
            bases = [mount / controllers, mount / "cpu"]
        else:
            continue
        group = Path(path.strip("/"))
        for base in bases:
            for folder in (group, *group.parents):
                yield base / folder


def _read_quota(folder: Path) -> float:
    """The quota of one group, in cores."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return _NO_QUOTA if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota_us = int((folder / "cpu.cfs_quota_us").read_text())
        period_us = int((folder / "cpu.cfs_period_us").read_text())
        return _NO_QUOTA if quota_us <= 0 else quota_us / period_us
    return _NO_QUOTA


def _round_up(cores: float) -> int:
    """Up, but not for the sake of the last hundredth, which some orchestrators add."""
    return 1 << 16 if math.isinf(cores) else math.ceil(cores - 0.01)
