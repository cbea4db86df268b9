"""`Clock`: gives a training loop one batch for each command of another process, and measures the step."""

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from tailtune.trainers.processes.peak_memory import Peak


class Clock:
    """Measures the steps of a training loop that this process runs.

    The loop iterates over `batches()`. Each time it asks for a batch, it waits for a line on standard input. The time
    from the batch to the next request is one step, with all that the loop itself does. What the loop prints goes to
    standard error.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def batches(self, batch: Any) -> Iterator[Any]:
        """The same batch for each line of standard input. The process ends with the input.

        Args:
            batch: what the loop gets.
        """
        self.answer({"ready": True})
        peak = Peak(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        while sys.stdin.readline():
            processor, wall = time.process_time(), time.perf_counter()
            yield batch
            times = {"processor": time.process_time() - processor, "wall": time.perf_counter() - wall}
            self.answer({**times, "memory": peak.above()})
        os._exit(0)  # out of the middle of any loop

    def answer(self, facts: dict[str, Any]) -> None:
        """Send a line of JSON to the other process."""
        print(json.dumps(facts), file=self._answers, flush=True)
