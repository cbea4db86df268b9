"""`Clock`: gives a training loop one batch for each command of another process, and measures the step."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from tailtune.benchmarks.steps import device
from tailtune.trainers.processes.peak_memory import Peak

Facts = dict[str, Any]


class Clock:
    """Measures the steps of a training loop that this process runs.

    The loop iterates over `batches()`. Each time it asks for a batch, it waits for a line on standard input, which is
    empty or names an entry of `OBSERVED`. The time from the batch to the next request is one step, with all that the
    loop itself does. What the loop prints goes to standard error.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def commands(self) -> Iterator[str]:
        """The lines of standard input, without their ends. The process ends with the input."""
        self.answer({"ready": True, **device.arithmetic()})
        while line := sys.stdin.readline():
            yield line.strip()
        os._exit(0)  # out of the middle of any loop

    def batches(self, batch: Any) -> Iterator[Any]:
        """The same batch for each line of standard input.

        Args:
            batch: what the loop gets.
        """
        peak: Peak | None = None
        for command in self.commands():
            peak = peak or Peak(device.device())
            device.finish()
            with OBSERVED[command]() as observed:
                processor, wall = time.process_time(), time.perf_counter()
                yield batch
                device.finish()
                took = {"processor": time.process_time() - processor, "wall": time.perf_counter() - wall}
            self.answer({**took, **peak.of_gpu(), "memory": peak.above(), **observed()})

    def answer(self, facts: Facts) -> None:
        """Send a line of JSON to the other process."""
        print(json.dumps(facts), file=self._answers, flush=True)


@contextmanager
def nothing() -> Iterator[Callable[[], Facts]]:
    """Only the time and the memory."""
    yield dict


@contextmanager
def flops() -> Iterator[Callable[[], Facts]]:
    """`flops`: floating-point operations of the step. On a CPU, those of fused attention are not counted."""
    with FlopCounterMode(display=False) as counter:
        yield lambda: {"flops": counter.get_total_flops()}


@contextmanager
def waits() -> Iterator[Callable[[], Facts]]:
    """`waits`: where the step waited for the GPU."""
    with device.waits() as found:
        yield lambda: {"waits": found}


OBSERVED: dict[str, Callable[[], AbstractContextManager[Callable[[], Facts]]]] = {
    "": nothing,
    "flops": flops,
    "waits": waits,
}
"""Command → what is observed of its step beside the time. `flops` and `waits` change the time."""
