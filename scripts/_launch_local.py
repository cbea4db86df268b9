"""Runs commands as processes on this machine, several at once, and shares its processors and GPUs among them."""

import os
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from signal import SIGTERM

from tailtune.configs.machine import available_processors
from tailtune.scripts._launches import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    Launch,
    chains,
    may_start,
    slurm_queue,
    state_of,
)
from tailtune.trainers.processes.interrupts import Interrupt

ASK_AFTER = 0.1
"""Seconds between two looks at the processes."""


@dataclass
class Slot:
    """A place for one process at a time, with its share of the machine."""

    processors: list[int]
    gpu: str | None
    """Value of `CUDA_VISIBLE_DEVICES`; None: that of this process."""
    rest: list[Launch] = field(default_factory=list)
    """Commands of the chain that this slot still has to start."""
    launch: Launch | None = None
    process: "subprocess.Popen[bytes] | None" = None
    since: float = 0.0

    def start(self, launch: Launch) -> None:
        """Start a command with the share of this slot."""
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(len(self.processors)))
        if self.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpu
        with _on_processors(self.processors):
            self.process = launch.start(environment, own_session=True)
        self.launch, self.since = launch, time.monotonic()


def slots(jobs: int, gpus: Sequence[str]) -> list[Slot]:
    """Places for `jobs` processes. Processors are divided among them, GPUs are given to them in turn.

    Args:
        jobs: number of processes at once. With more of them than processors, several share a processor.
        gpus: numbers of GPUs; empty: every process sees the GPUs that this one sees.
    """
    known = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(available_processors()))
    each = max(1, len(known) // jobs)
    shares = [[known[(slot * each + offset) % len(known)] for offset in range(each)] for slot in range(jobs)]
    return [Slot(share, gpus[slot % len(gpus)] if gpus else None) for slot, share in enumerate(shares)]


def run_local(todo: Sequence[Launch], places: Sequence[Slot], keep_going: bool) -> int:
    """Run commands in the places. What is finished, or running elsewhere, is not started.

    Ctrl-C asks every process to save its state, and waits for them.

    Args:
        todo: the commands.
        places: what `slots` returned.
        keep_going: whether to start further commands after a failure. Processes that run go on in any case.

    Returns:
        The exit code of the first command that failed, 130 after an interruption, otherwise 0.
    """
    queue, waiting, asked, first_failure = slurm_queue(todo), chains(todo), False, 0
    with Interrupt() as interrupt:
        while True:
            for place in places:
                code = _look_at(place, todo)
                first_failure = first_failure or code
            if interrupt.requested and not asked:
                asked = True
                for place in places:
                    if place.process is not None:
                        place.process.send_signal(SIGTERM)
            for place in places:
                while place.process is None and (place.rest or waiting) and not asked:
                    if first_failure and not keep_going:
                        break
                    place.rest = place.rest or _next(waiting, places)
                    if not place.rest:
                        break
                    _start(place, place.rest.pop(0), todo, queue)
            if all(place.process is None for place in places):
                return INTERRUPTED if asked else first_failure
            time.sleep(ASK_AFTER)


def _next(waiting: list[list[Launch]], places: Sequence[Slot]) -> list[Launch]:
    """Take the first chain that may start; empty if all have to wait for commands that run."""
    busy = [launch for place in places if place.process for launch in (place.launch, *place.rest) if launch]
    free = may_start(waiting, busy) or ([] if busy else waiting)
    return waiting.pop(waiting.index(free[0])) if free else []


def _start(place: Slot, launch: Launch, todo: Sequence[Launch], queue: dict[str, str]) -> None:
    """Start a command, unless it is finished, or running or waiting elsewhere."""
    state = state_of(launch, queue)
    if state.startable:
        place.start(launch)
        _say(launch, todo, f"started    python main.py {shlex.join(launch.words)}")
    else:
        where = "before" if state.kind == FINISHED else f"elsewhere: {state.about}"
        _say(launch, todo, f"{state.kind} {where}")


def _look_at(place: Slot, todo: Sequence[Launch]) -> int:
    """Note the end of the process of a place. Returns its exit code if it failed, otherwise 0."""
    launch, process = place.launch, place.process
    if launch is None or process is None or (code := process.poll()) is None:
        return 0
    place.process = None
    if launch.is_elsewhere(code):
        _say(launch, todo, "running elsewhere")
        return 0
    launch.ended(code)
    seconds = f"in {time.monotonic() - place.since:.0f} s"
    if code in (0, INTERRUPTED):
        _say(launch, todo, f"{FINISHED if code == 0 else 'stopped'} {seconds}")
        return 0
    _say(launch, todo, f"{FAILED} {seconds} (exit code {code}): {launch.last_line()}; log: {launch.log}")
    return code if code > 0 else 1  # below 0: a signal has killed it


def _say(launch: Launch, todo: Sequence[Launch], text: str) -> None:
    print(f"[{todo.index(launch) + 1}/{len(todo)}] {text}", flush=True)


@contextmanager
def _on_processors(processors: Sequence[int]) -> Iterator[None]:
    """A process that is started in the block runs on these processors, from which it counts threads and workers."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
