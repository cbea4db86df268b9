"""What a user sees during training: log lines, a progress bar on a terminal, and TensorBoard."""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tailtune.configs.console_text import WIDTH
from tailtune.trainers.processes.console_log import SHORT
from tailtune.trainers.runs.result_table import COLUMNS, number
from tailtune.trainers.storage.tensorboard_events import Events

LIFT_TAGS = {"loss": "loss.val", "loss_avg": "loss.avg", "acc": "acc.val", "acc_avg": "acc.avg"}
"""Name of a training curve → LIFT's name."""

log = logging.getLogger("tailtune")


PLACE = ("epoch", "step")
"""Entries of a validation that are no metrics."""


class Curves:
    """The curves of a training: files for TensorBoard, and the trackers of the accelerator.

    Args:
        main: whether this is the main process; others write nothing.
        folder: folder of the event files; None: there are none.
        log: (values by tag, step) → gives them to the trackers.
        lift_tags: name the curves as LIFT does.
    """

    def __init__(
        self, main: bool, folder: Path | None, log: Callable[[dict[str, float], int], None], lift_tags: bool
    ) -> None:
        self.main, self.folder, self.log = main, folder, log
        self.tags = LIFT_TAGS if lift_tags else {}
        self.events: Events | None = None

    def open(self, start: int) -> None:
        """Begin after `start` steps of the run. TensorBoard hides later ones of an earlier file."""
        if self.main and self.folder is not None:
            self.events = Events(self.folder, purge_step=start + 1 if start else None)

    def add(self, group: str, values: Mapping[str, float | None], step: int) -> None:
        """Add a point to the curve `group/name` of each value that is not None."""
        named = {f"{group}/{self.tags.get(name, name)}": value for name, value in values.items() if value is not None}
        if named and self.main:
            self.log(named, step)
        if self.events is not None:
            for tag, value in named.items():
                self.events.add_scalar(tag, value, step)

    def flush(self) -> None:
        """Write everything that was added so far."""
        if self.events is not None:
            self.events.flush()

    def close(self) -> None:
        """Close the event file; the trackers go on, as they also get the results of the test."""
        if self.events is not None:
            self.events.close()


class Progress:
    """Log lines, progress bar and TensorBoard of the main process; on other processes it does nothing.

    Args:
        curves: where the curves go.
        epochs: number of epochs of the run.
        steps: steps in an epoch.
        start: steps that are done already.
        total: steps of the whole run.
    """

    def __init__(self, curves: "Curves", epochs: int, steps: int, start: int, total: int) -> None:
        self.epochs, self.steps, self.total = epochs, steps, total
        self.curves = curves
        curves.open(start)
        shown = curves.main and sys.stderr.isatty()
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
        validated: Mapping[str, Any] | None = None,
    ) -> None:
        """Show the steps since the last call.

        Args:
            done: steps of the run that are done.
            rate: number of a step and steps in an epoch → learning rate of that step.
            steps: loss and accuracy of each step since the last call.
            groups: mean accuracy of all classes and of each group, in %; None: not known yet.
            validated: metrics of the validation after this step, if there was one.
        """
        if not self.curves.main or not steps:
            return
        for offset, values in enumerate(steps, start=done - len(steps) + 1):
            self.curves.add("train", {"lr": rate(offset, self.steps), **values}, offset)
        self.curves.add("train", groups, done)
        self.curves.add("val", {name: value for name, value in (validated or {}).items() if name not in PLACE}, done)
        self.curves.flush()
        self._line(done, rate(done, self.steps), steps[-1], groups, validated)

    def close(self) -> None:
        """Close the bar and the event file."""
        self.bar.close()
        self.redirect.close()
        self.curves.close()

    def _line(
        self,
        done: int,
        lr: float,
        last: Mapping[str, float],
        groups: Mapping[str, float | None],
        validated: Mapping[str, Any] | None,
    ) -> None:
        """One line of the log, and a short one of at most 80 columns for a terminal."""
        now = time.perf_counter()
        new_steps = max(1, done - self.since_step)
        seconds, waited = (now - self.since) / new_steps, self.waited / new_steps  # of one step
        self.since, self.since_step, self.waited = now, done, 0.0
        epoch, batch = (done - 1) // self.steps + 1, (done - 1) % self.steps + 1
        eta = _clock(seconds * (self.total - done))
        val, short_val = "", ""
        if validated is not None:
            val = f"val acc {validated['accuracy']:.2f} ({_groups(validated)}) nll {validated['nll']:.4f} "
            short_val = f"val {validated['accuracy']:.1f} mean {validated['mean_acc']:.1f} "
        at = f"batch {batch}/{self.steps} " if validated is None else ""  # a validation comes at the end of an epoch
        loss, acc = last["loss_avg"], last["acc_avg"]
        short = f"epoch {epoch}/{self.epochs} {at}loss {loss:.4g} acc {acc:.1f} {short_val}eta {eta}"
        log.info(
            f"epoch [{epoch}/{self.epochs}] batch [{batch}/{self.steps}] time {seconds:.3f} data {waited:.3f} "
            f"loss {last['loss']:.4f} ({last['loss_avg']:.4f}) acc {last['acc']:.2f} ({last['acc_avg']:.2f}) "
            f"({_groups(groups)}) {val}lr {lr:.4e} eta {eta}",
            extra={SHORT: short[:WIDTH]},
        )


def _groups(values: Mapping[str, Any]) -> str:
    """The mean accuracy of all classes and of each group."""
    short = {"mean_acc": "mean", "many_acc": "many", "med_acc": "med", "few_acc": "few"}
    return " ".join(f"{title} {number(values[name])}" for name, title in short.items())


def test_curves(metrics: Mapping[str, Any], distributions: Mapping[str, Any]) -> dict[str, float]:
    """The results of a test as points of curves.

    Args:
        metrics: metrics on the test data as they are.
        distributions: name of a test distribution → its results.

    Returns:
        Tag → value. The tags are `test/<metric>`, `test/<distribution>/<metric>`, and
        `test/<distribution>/<name>/<metric>` for every predictor but the plain one.
    """
    groups = {"test": metrics}
    for name, results in distributions.items():
        groups[f"test/{name}"] = {**results["predictors"]["plain"], "expected_accuracy": results["expected_accuracy"]}
        groups |= {f"test/{name}/{key}": found for key, found in results["predictors"].items() if key != "plain"}
    return {
        f"{group}/{name}": value
        for group, values in groups.items()
        for name, value in values.items()
        if isinstance(value, (int, float))
    }


def write_test_curves(
    folder: Path,
    step: int,
    curves: Mapping[str, float],
    distributions: Mapping[str, Any],
    options: Mapping[str, Any] | None,
    pictures: Mapping[str, bytes],
) -> None:
    """Write the results of a test for TensorBoard. Weights of experts are curves over their updates.

    Args:
        folder: folder of the event file.
        step: number of optimizer steps that the run has trained.
        curves: what `test_curves` returned.
        distributions: name of a test distribution → its results.
        options: training options for TensorBoard's tab of hyperparameters; None: the run has no line there.
        pictures: tag → content of a PNG file.
    """
    with Events(folder) as writer:
        if options is not None:
            shown = {name: value for name, value in options.items() if value is not None}
            writer.add_options(shown, [f"test/{name}" for name in COLUMNS if f"test/{name}" in curves])
        for tag, value in curves.items():
            writer.add_scalar(tag, value, step)
        for tag, png in pictures.items():
            writer.add_picture(tag, png, step)
        for name, results in distributions.items():
            for predictor, values in results["predictors"].items():
                for point, weights in enumerate(values.get("path", []), start=1):
                    for expert, weight in enumerate(weights):
                        writer.add_scalar(f"test/{name}/{predictor}/weight_{expert}", weight, point)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
