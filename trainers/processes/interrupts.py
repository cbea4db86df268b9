"""Lets Ctrl-C, SIGTERM and SIGUSR1 stop the training after the current step, with the state saved."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tailtune.trainers.processes.launcher import IMPATIENT

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals of Ctrl-C, of a request to end the process, of a closed terminal, and of a scheduler that is about to end the
job (`--signal=USR1` of SLURM)."""

ASK_AFTER, MOST_STEPS = 2.0, 50
"""Several processes exchange whether to stop: about every `ASK_AFTER` seconds, and at least every `MOST_STEPS` steps.

The interval has to be short: a launcher forwards a signal to its processes, and kills them 30 seconds later.
"""


HINTS: list[str] = []
"""What a user reads after `interrupted; ` if a signal ends the process now; the last one counts."""


class Interrupted(Exception):
    """A signal has stopped the run, and its state is saved. `main.py` then exits with code 130.

    Its text says how to continue.
    """


def how_to_continue(resume: bool) -> str:
    """What the user of a run whose state is saved has to do, by the option `resume` of the command."""
    return "the same command continues" if resume else "the same command without `resume False` continues"


@contextmanager
def with_hint(hint: str) -> Iterator[None]:
    """Context manager: if a signal ends the block, the user reads the hint. An empty one changes nothing."""
    HINTS.append(hint)
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(hint) from None
    finally:
        HINTS.pop()


def interruption(line: str, hint: str) -> str:
    """The message after an interruption: the line, or the hint if there is one."""
    return f"interrupted; {hint}" if hint else line


class Interrupt:
    """Context manager for signals. In its block, the first signal only sets `requested`.

    A second signal, at least `IMPATIENT` seconds later, has the same effect as outside the block.
    """

    def __init__(self) -> None:
        self.requested = False
        self.since = 0.0

    def __enter__(self) -> "Interrupt":
        # Python refuses handlers outside the main thread, where a program may run the Python API.
        numbers = handled_signals() if threading.current_thread() is threading.main_thread() else []
        self._before: dict[int, Any] = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self.since = True, time.monotonic()
        elif time.monotonic() - self.since > IMPATIENT:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)


class Agreement:
    """Lets several processes decide together whether to stop, because all have to stop after the same step.

    The processes exchange their requests about every `ASK_AFTER` seconds. The step of the next exchange is computed
    from the mean of their times, so it is the same for all processes.

    Args:
        processes: number of processes.
        step: number of finished steps.
        total: sums numbers over the processes. It waits for the device, so it is not called after every step.
    """

    def __init__(self, processes: int, step: int, total: Callable[[list[float]], list[float]]) -> None:
        self.processes, self.total = processes, total
        self.before, self.since, self.next = step, time.perf_counter(), step + 1

    def stops(self, requested: bool, step: int) -> bool:
        """Whether all processes stop after this step.

        Args:
            requested: whether this process has received a signal.
            step: number of finished steps.
        """
        if self.processes == 1:
            return requested
        if step < self.next:
            return False
        now = time.perf_counter()
        wishes, seconds = self.total([float(requested), now - self.since])
        pace = seconds / self.processes / (step - self.before)
        self.before, self.since = step, now
        self.next = step + min(MOST_STEPS, max(1, int(ASK_AFTER / max(pace, 1e-6))))
        return wishes > 0


def handled_signals() -> list[signal.Signals]:
    """The signals that TailTune handles. SIGHUP is left out if `nohup` has set it to be ignored."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
