"""Experiment trackers such as Weights & Biases and MLflow, all of them Accelerate's own (`accelerate.tracking`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers, get_available_trackers
from accelerate.utils import LoggerType

from tailtune.configs import CfgNode
from tailtune.configs.errors import UserError, lookup
from tailtune.configs.option import option
from tailtune.configs.value_parsers import as_names
from tailtune.trainers.distributed import on_main
from tailtune.trainers.progress import Curves

TENSORBOARD = "tensorboard"
"""The tracker whose files we write ourselves: they then survive a full disk and have no steps twice after a resume."""
PROJECT = "tailtune"


@dataclass(frozen=True)
class TrackerOptions:
    """Where the curves of a run go."""

    trackers: list[str] = option(
        [TENSORBOARD],
        "Programs that get the curves: tensorboard, and each one that Accelerate knows (wandb, mlflow …) and that is "
        "installed.",
        as_names,
        cls="runtime",
    )
    tensorboard_tags: str = option(
        "plain",
        "Names of the training curves: train/loss and train/loss_avg (plain), or train/loss.val and train/loss.avg "
        "(lift).",
        cls="runtime",
        choices=("plain", "lift"),
    )


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers can be started.

    Raises:
        UserError: a tracker is unknown, or its package is not installed.
    """
    missing = set(LoggerType.list()) - {str(name) for name in get_available_trackers()} - {TENSORBOARD}
    for name in names:
        lookup(LOGGER_TYPE_TO_CLASS, name, "tracker")
        if name in missing:
            raise UserError(f"trackers: {name} is not installed; run `pip install {name}`, or leave it out")


@dataclass(frozen=True)
class CurvePlan:
    """Where the curves of a run go, read from the config."""

    trackers: list[str]
    lift_tags: bool

    @classmethod
    def of(cls, cfg: CfgNode) -> "CurvePlan":
        """Read the settings from a config."""
        return cls(cfg.trackers, cfg.tensorboard_tags == "lift")


def start_curves(
    accelerator: Accelerator, plan: CurvePlan, folder: Path, run: str, options: Mapping[str, Any]
) -> Curves:
    """Start all trackers but TensorBoard on the first process. All processes must call this together.

    Args:
        accelerator: keeps the trackers; `accelerator.log` gives them values.
        plan: the settings.
        folder: the run folder, which gives the run its name, and where TensorBoard's files and those of others are.
        run: identifier of the run; a run that resumes continues its record at Weights & Biases.
        options: the training options.

    Returns:
        The curves of the training.

    Raises:
        UserError: a tracker cannot be started; the message has its reason.
    """
    others = [name for name in plan.trackers if name != TENSORBOARD]

    def start() -> None:
        accelerator.project_configuration.set_directories(str(folder))
        accelerator.log_with = filter_trackers(others, accelerator.logging_dir)
        known = {name: value for name, value in options.items() if value is not None}
        try:
            accelerator.init_trackers(
                PROJECT, known, {"wandb": {"name": folder.name, "id": run, "resume": "allow", "dir": str(folder)}}
            )
        except Exception as error:  # of the tracker's library: no login, no network …
            reason = " ".join(str(error).split())
            raise UserError(f"trackers {','.join(others)} cannot start ({reason}); leave them out") from error

    if others:
        on_main(accelerator, start)
    events = folder / "tensorboard" if TENSORBOARD in plan.trackers else None
    return Curves(accelerator.is_main_process, events, accelerator.log, plan.lift_tags)


def finish_trackers(accelerator: Accelerator) -> None:
    """End all trackers. Accelerate's `end_training` would also end the processes' connection."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers.clear()
