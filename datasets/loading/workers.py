"""Worker processes that decode images: how many this machine can run, how they start, and how they end."""

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
from tailtune.configs.machine import available_processors

LINUX = sys.platform == "linux"
SHARED_MEMORY = Path("/dev/shm")
"""File system of Linux for shared memory, through which the main process gets decoded batches."""
PREFETCHED_BATCHES = 2
"""Batches that each worker decodes ahead."""
BATCHES_IN_USE = 2
"""Batches that the main process holds: the one that it computes on, and the next."""
STUCK_SECONDS = 300.0
"""The workers are ended if no batch came for so long."""
CHECK_SECONDS = 1.0
"""Time between two checks of the workers.

The time without a batch is measured as a number of checks, because a clock also runs while the whole job is stopped
(SIGSTOP, SIGCONT).
"""

CONTINUES = "the same command continues"
USE_LESS = "lower num_workers, or micro_batch_size and test_batch_size"
SHARED_MEMORY_FULL = f"{SHARED_MEMORY} is full: {USE_LESS}, or give {SHARED_MEMORY} more space; {CONTINUES}"
KILLED_BY: dict[int, str] = {
    signal.SIGKILL: f"was killed (out of memory?): {USE_LESS}",
    signal.SIGBUS: f"was killed (is {SHARED_MEMORY} full?): {USE_LESS}, or give {SHARED_MEMORY} more space",
}
"""Signal that ended a worker → what happened, and the remedy, for messages."""
PR_SET_PDEATHSIG = 1
"""Operation of Linux's `prctl`: send this process a signal when its parent ends."""

Result = TypeVar("Result")

log = logging.getLogger("tailtune")


def usable_workers(wanted: int, batch_bytes: Callable[[], int]) -> int:
    """How many worker processes this machine can run. The number has no influence on the batches.

    Args:
        wanted: the option `num_workers`. More workers than processors are never started.
        batch_bytes: returns the bytes of one decoded batch, summed over all processes of the run.

    Returns:
        At most `wanted`; 0, with a warning, if the shared memory is too small for the workers.
    """
    count = min(wanted, available_processors())
    if not count:
        return 0
    free, needed = free_shared_memory(), (PREFETCHED_BATCHES * count + BATCHES_IN_USE) * batch_bytes()
    if free >= needed:
        return count
    log.warning(
        f"warning: num_workers {wanted} needs {needed / 2**20:.1f} MiB in {SHARED_MEMORY}, which has "
        f"{free / 2**20:.1f} MiB left: the main process decodes the images instead, which is slower"
    )
    return 0


def free_shared_memory() -> float:
    """Bytes that can still be written to `SHARED_MEMORY`; infinite on systems other than Linux."""
    if not LINUX:
        return math.inf
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize if os.access(SHARED_MEMORY, os.W_OK) else 0


def set_worker_signals(worker_index: int) -> None:
    """Let a worker ignore signals and end with the main process. It runs at the start of each worker.

    Ctrl-C and the SIGTERM of a scheduler reach every process of a job. The main process reacts to them and ends its
    workers when it no longer needs them.

    Args:
        worker_index: torch passes it; it is not used.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not LINUX:  # on other systems torch ends its workers by SIGTERM
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():  # the main process ended before the call of prctl
        os._exit(1)


class _KilledOnTerminate(popen_fork.Popen):
    """Handle of a worker whose `terminate` sends SIGKILL."""

    def terminate(self) -> None:
        self.kill()


class Worker(ForkProcess):
    """A process that ignores SIGTERM. torch and Python end it by `terminate`, which therefore kills it."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return _KilledOnTerminate(process_obj)


class _QuietQueue(Queue):
    """A queue that prints no error if its pipe is closed, as it is after the workers have ended."""

    @staticmethod
    def _on_queue_feeder_error(error: BaseException, sent: Any) -> None:
        if not isinstance(error, OSError):
            Queue._on_queue_feeder_error(error, sent)  # type: ignore[attr-defined]


class WorkerContext(ForkContext):
    """The multiprocessing context of a DataLoader. It starts `Worker` processes.

    Args:
        processes: a list to which every started worker is appended.
    """

    def __init__(self, processes: list[Worker]) -> None:
        super().__init__()
        self.processes = processes

    def Queue(self, maxsize: int = 0) -> Queue:
        """A queue for batches or keys; multiprocessing and torch call this method."""
        return _QuietQueue(maxsize, ctx=self.get_context())

    def Process(self, *args: Any, **named: Any) -> Worker:  # type: ignore[override]
        """A worker that has not started yet; torch calls this method."""
        process = Worker(*args, **named)
        self.processes.append(process)
        return process


class WorkerMonitor:
    """Notices during an iteration over a loader that workers have ended or deliver no batches.

    It holds no reference to the loader or its iterator, because those must be destroyed in the main thread.

    Args:
        processes: the workers; the list may grow later.
        has_workers: whether there will be any.
    """

    def __init__(self, processes: list[Worker], has_workers: bool) -> None:
        self.processes = processes
        self.is_waiting = self.is_stuck = False
        self.closed, self._ending = threading.Event(), threading.Lock()
        if has_workers and LINUX:  # on other systems torch manages the processes
            threading.Thread(target=self._check_regularly, daemon=True).start()

    def waiting(self, call: Callable[[], Result]) -> Result:
        """Run a call that waits for the workers, and count its time as time without a batch.

        Args:
            call: for example `lambda: next(batches)`. Every 5 s torch checks in it whether the workers are alive.

        Returns:
            The result of the call.
        """
        self.is_waiting = True
        try:
            return call()
        finally:
            self.is_waiting = False

    def failure(self, wait_seconds: float) -> UserError | None:
        """The error that describes what happened to the workers.

        Args:
            wait_seconds: how long to wait for a worker to end.

        Returns:
            None if no worker is stuck or has ended by itself.
        """
        if self.is_stuck:
            return UserError(
                f"the processes that decode images have delivered none for {STUCK_SECONDS:.0f} s: check whether the "
                f"disk responds, or set num_workers 0; {CONTINUES}"
            )
        end = time.monotonic() + wait_seconds
        while not (exit_codes := [process.exitcode for process in self.processes if process.exitcode]):
            if time.monotonic() >= end:
                return None
            time.sleep(0.02)
        ended = f"has ended (exit code {exit_codes[0]}): set num_workers 0, which shows why"
        return UserError(f"a process that decodes images {KILLED_BY.get(-exit_codes[0], ended)}; {CONTINUES}")

    def end_workers(self) -> None:
        """Kill the workers and wait until they have ended."""
        with self._ending:  # if two threads wait for one process, one of them returns before its end is known
            for process in self.processes:
                process.kill()
            for process in self.processes:
                process.join()

    def close(self) -> None:
        """End the thread that checks the workers."""
        self.closed.set()

    def _check_regularly(self) -> None:
        """Run in a thread. If the workers are stuck, kill them: that also ends the main thread's wait for them."""
        checks = 0
        while not self.closed.wait(CHECK_SECONDS):
            checks = checks + 1 if self.is_waiting else 0
            if checks * CHECK_SECONDS >= STUCK_SECONDS:
                self.is_stuck = True
                self.end_workers()
                return
