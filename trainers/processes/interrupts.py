"""Ctrl-C and SIGTERM stop training after the current step, with its state saved."""

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from tailtune.trainers.processes.launcher import IMPATIENT

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a request to end, a terminal that was closed."""

ASK_AFTER, MOST_STEPS = 2.0, 50
"""Several processes ask each other whether to stop: about every `ASK_AFTER` seconds, at least every `MOST_STEPS` steps.

A launcher passes a signal on, and kills its processes 30 seconds later.
"""


class Interrupted(Exception):
    """The run was asked to stop, and has stopped with its state saved; `main.py` then exits with 130."""


class Interrupt:
    """Within its `with` block the first signal only sets `requested`; a later one acts as it would outside."""

    def __init__(self) -> None:
        self.requested = False
        self.since = 0.0

    def __enter__(self) -> "Interrupt":
        self._before: dict[int, Any] = {number: signal.signal(number, self._note) for number in handled_signals()}
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
    """Lets several processes decide together whether to stop, because they can only stop at the same step.

    They ask each other about every `ASK_AFTER` seconds. The next step at which they ask follows from the mean of
    their times, so it is the same for all.

    Args:
        processes: number of processes.
        step: number of steps that are done.
        total: sums numbers over the processes. It waits for the device, so it is not called at every step.
    """

    def __init__(self, processes: int, step: int, total: Callable[[list[float]], list[float]]) -> None:
        self.processes, self.total = processes, total
        self.before, self.since, self.next = step, time.perf_counter(), step + 1

    def stops(self, requested: bool, step: int) -> bool:
        """Whether all processes stop after this step.

        Args:
            requested: whether this process was asked to stop.
            step: number of steps that are done.
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
    """The signals that we handle: not SIGHUP if `nohup` has set that it is ignored."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
