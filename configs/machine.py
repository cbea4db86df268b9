"""What this process may use of the machine that it runs on."""

import os
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux describes the limits of containers and batch jobs (version 2)."""
OWN_CGROUP = Path("/proc/self/cgroup")
LARGEST_SHARE = 0.8
"""Share of the free memory or disk space that a cache may take."""


def available_processors() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_processes() -> int:
    """Number of processes of the run on this machine, which share its processors and its memory."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(count)) if count.isdecimal() else 1


def total_memory() -> int:
    """Bytes of main memory that the machine has, or the container or batch job of this process if that is less."""
    limits = (_limit(group) for group in _cgroups())
    return min([psutil.virtual_memory().total, *(each for each in limits if each is not None)])


def free_memory() -> int:
    """Bytes of memory that this process can still use, within the limit of its container or batch job."""
    left = (_left(group) for group in _cgroups())
    return min([psutil.virtual_memory().available, *(each for each in left if each is not None)])


def _cgroups() -> list[Path]:
    """This process's control group, and the groups around it; empty where there are none."""
    try:
        own = next(line for line in OWN_CGROUP.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    group = CGROUPS / own.removeprefix("0::").lstrip("/")
    return [group, *group.parents]


def _limit(group: Path) -> int | None:
    """The limit of a group, in bytes."""
    try:
        return int((group / "memory.max").read_text())
    except (OSError, ValueError):  # no limit is called `max`
        return None


def _left(group: Path) -> int | None:
    """Bytes below the limit of a group. Cached files do not count, because Linux drops them."""
    limit = _limit(group)
    try:
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return None if limit is None else max(0, limit - used + int(statistics.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None
