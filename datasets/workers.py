"""Processes that decode images: how many this machine can serve, and how they begin and end."""

import ctypes
import logging
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.context import ForkContext, ForkProcess
from pathlib import Path
from typing import Any

LINUX = sys.platform == "linux"
SHARED = Path("/dev/shm")
"""Where Linux keeps the memory through which decoded batches come to this process."""
AHEAD = 2
"""Batches that each process decodes ahead."""
IN_USE = 2
"""Batches that the main process still holds: the one that it computes on, and the next."""
PR_SET_PDEATHSIG = 1

log = logging.getLogger("tailtune")


def possible_workers(wanted: int, batch_bytes: Callable[[], int]) -> int:
    """How many of the processes that are asked for this machine can serve; the batches are the same with any number.

    Args:
        wanted: `num_workers`. More than there are processors would only wait.
        batch_bytes: gives the size of a decoded batch, over all processes of the run.
    """
    found = min(wanted, _processors())
    if not found:
        return 0
    free, needed = _shared_memory(), (AHEAD * found + IN_USE) * batch_bytes()
    if free >= needed:
        return found
    log.warning(
        f"warning: num_workers {wanted} needs {needed / 2**20:.1f} MiB in {SHARED}, where {free / 2**20:.1f} MiB can "
        "be written: this process decodes the images instead, which is slower"
    )
    return 0


def _shared_memory() -> float:
    """Bytes that can still be written to `SHARED`."""
    if not LINUX:
        return math.inf
    try:
        found = os.statvfs(SHARED)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize if os.access(SHARED, os.W_OK) else 0


def _processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_signals(_: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of a job: the main one answers, and ends its workers.

    A worker ends with the main process, however that ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not LINUX:  # there torch ends its workers by SIGTERM
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():  # it ended before the line above
        os._exit(1)


class Worker(ForkProcess):
    """A process that ignores SIGTERM, so that to end it, which torch and Python do by SIGTERM, means to kill it."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        popen: Any = ForkProcess._Popen(process_obj)
        popen.terminate = popen.kill
        return popen


class Workers(ForkContext):
    """Starts `Worker`s, and notes them in a list."""

    def __init__(self, started: list[Worker]) -> None:
        super().__init__()
        self.started = started

    def Process(self, *args: Any, **named: Any) -> Worker:  # type: ignore[override]
        process = Worker(*args, **named)
        self.started.append(process)
        return process
