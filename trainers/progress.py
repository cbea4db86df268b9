"""What a user sees during training: log lines, a progress bar on a terminal, and TensorBoard."""

import logging
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tailtune.trainers.runs.result_table import number
from tailtune.trainers.storage.tensorboard_events import Events

log = logging.getLogger("tailtune")


class Progress:
    """Log lines, progress bar and TensorBoard of the main process; on other processes it does nothing.

    Args:
        folder: folder of the event files; None on processes that show nothing.
        epochs: number of epochs of the run.
        steps: steps in an epoch.
        start: steps that are done already.
        total: steps of the whole run.
    """

    def __init__(self, folder: Path | None, epochs: int, steps: int, start: int, total: int) -> None:
        self.epochs, self.steps, self.total = epochs, steps, total
        self.writer = None if folder is None else Events(folder, purge_step=start + 1 if start else None)
        shown = folder is not None and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, unit="step", disable=not shown, leave=False)
        self.redirect = ExitStack()
        if shown:
            self.redirect.enter_context(logging_redirect_tqdm([log]))  # log lines appear above the bar, not within it
        self.since, self.since_step, self.waited = time.perf_counter(), start, 0.0

    def step(self) -> None:
        """Move the bar by one step."""
        self.bar.update()

    def show(
        self,
        done: int,
        rate: Callable[[int, int], float],
        steps: list[dict[str, float]],
        groups: dict[str, float | None],
    ) -> None:
        """Show the steps since the last call.

        Args:
            done: steps of the run that are done.
            rate: number of a step and steps in an epoch → learning rate of that step.
            steps: loss and accuracy of each step since the last call.
            groups: mean accuracy of all classes and of each group, in %; None: not known yet.
        """
        if self.writer is None or not steps:
            return
        for offset, values in enumerate(steps, start=done - len(steps) + 1):
            self.writer.add_scalar("train/lr", rate(offset, self.steps), offset)
            for name, value in values.items():
                self.writer.add_scalar(f"train/{name}", value, offset)
        for name, accuracy in groups.items():
            if accuracy is not None:
                self.writer.add_scalar(f"train/{name}", accuracy, done)
        self.writer.flush()
        self._line(done, rate(done, self.steps), steps[-1], groups)

    def close(self) -> None:
        """Close the bar and the event file."""
        self.bar.close()
        self.redirect.close()
        if self.writer is not None:
            self.writer.close()

    def _line(self, done: int, lr: float, last: dict[str, float], groups: dict[str, float | None]) -> None:
        now = time.perf_counter()
        new_steps = max(1, done - self.since_step)
        seconds, waited = (now - self.since) / new_steps, self.waited / new_steps  # of one step
        self.since, self.since_step, self.waited = now, done, 0.0
        epoch, batch = (done - 1) // self.steps + 1, (done - 1) % self.steps + 1
        short = {"mean_acc": "mean", "many_acc": "many", "med_acc": "med", "few_acc": "few"}
        shots = " ".join(f"{short[name]} {number(value)}" for name, value in groups.items())
        log.info(
            f"epoch [{epoch}/{self.epochs}] batch [{batch}/{self.steps}] time {seconds:.3f} data {waited:.3f} "
            f"loss {last['loss.val']:.4f} ({last['loss.avg']:.4f}) acc {last['acc.val']:.2f} ({last['acc.avg']:.2f}) "
            f"({shots}) lr {lr:.4e} eta {_clock(seconds * (self.total - done))}"
        )


def write_test_scalars(folder: Path, metrics: dict[str, Any], distributions: dict[str, Any]) -> None:
    """Write the results of a test as curves for TensorBoard.

    The tags are `test/<metric>`, `test/<distribution>/<metric>`, and `test/<distribution>/<name>/<metric>` for every
    predictor but the plain one. Weights of experts are `…/<name>/weight_<expert>` over their updates.

    Args:
        folder: folder of the event file.
        metrics: metrics on the test data as they are.
        distributions: name of a test distribution → its results.
    """
    with Events(folder) as writer:
        _scalars(writer, "test", metrics)
        for name, results in distributions.items():
            _scalars(writer, f"test/{name}", {"expected_accuracy": results["expected_accuracy"]})
            for predictor, values in results["predictors"].items():
                tag = f"test/{name}" if predictor == "plain" else f"test/{name}/{predictor}"
                _scalars(writer, tag, values)
                for point, weights in enumerate(values.get("path", []), start=1):
                    for expert, weight in enumerate(weights):
                        writer.add_scalar(f"{tag}/weight_{expert}", weight, point)


def _scalars(writer: Events, tag: str, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, (int, float)):
            writer.add_scalar(f"{tag}/{name}", value)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
