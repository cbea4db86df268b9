"""Ctrl-C and SIGTERM end training at the next step, with its state saved."""

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from tailtune.trainers.processes.launcher import IMPATIENT

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a polite kill, a terminal that is gone."""

ASK_AFTER, MOST_STEPS = 2.0, 50
"""Several processes ask each other whether to stop after about so many seconds, but at most so many steps.

A launcher that passes a signal on waits 30 seconds before it kills.
"""


class Interrupted(Exception):
    """The run was asked to stop and did, with its state saved; `main.py` exits with 130."""


class Interrupt:
    """Within the block a signal sets `requested`; a later one acts as it would outside."""

    def __init__(self) -> None:
        self.requested = False
        self.since = 0.0

    def __enter__(self) -> "Interrupt":
        self._before: dict[int, Any] = {each: signal.signal(each, self._note) for each in answered()}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self.since = True, time.monotonic()
        elif time.monotonic() - self.since > IMPATIENT:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)


class Agreement:
    """Whether several processes stop now, which they can only do together: they ask each other now and then.

    After about `ASK_AFTER` seconds, a step that follows from the mean of their times, so that all ask at the same one.

    Args:
        processes: how many there are.
        step: that is done.
        total: sums of numbers over the processes. It waits for the device, so it is not asked at every step.
    """

    def __init__(self, processes: int, step: int, total: Callable[[list[float]], list[float]]) -> None:
        self.processes, self.total = processes, total
        self.before, self.since, self.next = step, time.perf_counter(), step + 1

    def stops(self, requested: bool, step: int) -> bool:
        """Whether any process wants to stop, as far as this one knows after `step`."""
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


def answered() -> list[signal.Signals]:
    """The signals that are ours to answer: `nohup` asks that the end of a terminal be overlooked."""
    return [each for each in SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
