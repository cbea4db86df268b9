"""Processes that decode images: how many this machine can serve, and how they begin and end."""

import ctypes
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import popen_fork
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, TypeVar

from tailtune.configs.errors import UserError

LINUX = sys.platform == "linux"
SHARED = Path("/dev/shm")
"""Where Linux keeps the memory through which decoded batches come to this process."""
AHEAD = 2
"""Batches that each process decodes ahead."""
IN_USE = 2
"""Batches that the main process still holds: the one that it computes on, and the next."""
STUCK, TICK = 300.0, 1.0
"""Seconds: without a batch, after which the processes that decode count as stuck; and of one look at them.

Looks are counted, not time, because a clock goes on while a whole job is stopped (SIGSTOP, SIGCONT).
"""

CONTINUES = "the same command continues"
LESS = "lower num_workers, or micro_batch_size and test_batch_size"
FULL = f"{SHARED} is full: {LESS}, or give {SHARED} more space; {CONTINUES}"
ENDED: dict[int, str] = {
    signal.SIGKILL: f"was killed (out of memory?): {LESS}",
    signal.SIGBUS: f"was killed (is {SHARED} full?): {LESS}, or give {SHARED} more space",
}
"""Signal that ended a process → what happened, and the remedy."""
PR_SET_PDEATHSIG = 1

Result = TypeVar("Result")

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


class _Handle(popen_fork.Popen):
    """A process as its parent sees it."""

    def terminate(self) -> None:
        self.kill()


class Worker(ForkProcess):
    """A process that ignores SIGTERM, so that to end it, which torch and Python do by SIGTERM, means to kill it."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return _Handle(process_obj)


class _QuietQueue(Queue):
    """A queue whose thread says nothing of a pipe that is closed already, when the processes at its end are gone."""

    @staticmethod
    def _on_queue_feeder_error(error: BaseException, sent: Any) -> None:
        if not isinstance(error, OSError):
            Queue._on_queue_feeder_error(error, sent)  # type: ignore[attr-defined]


class Workers(ForkContext):
    """Starts `Worker`s, and notes them in a list."""

    def __init__(self, started: list[Worker]) -> None:
        super().__init__()
        self.started = started

    def Queue(self, maxsize: int = 0) -> Queue:
        return _QuietQueue(maxsize, ctx=self.get_context())

    def Process(self, *args: Any, **named: Any) -> Worker:  # type: ignore[override]
        process = Worker(*args, **named)
        self.started.append(process)
        return process


class Watch:
    """Looks after the processes of a loader while it is iterated: they must give batches, and must not end.

    It keeps neither the loader nor its iterator alive, whose end has to be the main thread's.

    Args:
        processes: those that are there, and those that will be.
        several: whether there will be any.
    """

    def __init__(self, processes: list[Worker], several: bool) -> None:
        self.processes = processes
        self.waits = self.stuck = False
        self.done = threading.Event()
        if several and LINUX:  # elsewhere the processes are not ours to end
            threading.Thread(target=self._look, daemon=True).start()

    def during(self, wait: Callable[[], Result]) -> Result:
        """What `wait` returns, which waits for the processes; torch looks every 5 s then whether they live."""
        self.waits = True
        try:
            return wait()
        finally:
            self.waits = False

    def found(self, seconds: float) -> UserError | None:
        """What is to be said of processes that have ended though nobody asked for it, or will in some seconds."""
        if self.stuck:
            return UserError(
                f"the processes that decode images have given none for {STUCK:.0f} s: see whether the disk answers, "
                f"or set num_workers 0; {CONTINUES}"
            )
        end = time.monotonic() + seconds
        while not (codes := [each.exitcode for each in self.processes if each.exitcode]):
            if time.monotonic() >= end:
                return None
            time.sleep(0.02)
        gone = f"is gone (exit code {codes[0]}): set num_workers 0, which shows why"
        return UserError(f"a process that decodes images {ENDED.get(-codes[0], gone)}; {CONTINUES}")

    def end(self) -> None:
        """Kill the processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def close(self) -> None:
        self.done.set()

    def _look(self) -> None:
        """In a thread: that the processes end also ends a wait for them, wherever in torch it is."""
        looks = 0
        while not self.done.wait(TICK):
            looks = looks + 1 if self.waits else 0
            if looks * TICK >= STUCK:
                self.stuck = True
                self.end()
                return
