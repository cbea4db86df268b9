"""`run_stages`: the runs of a command, one after another. The command line and the Python API call it."""

from collections.abc import Sequence
from pathlib import Path

from tailtune.configs import CfgNode
from tailtune.trainers.config_checks import validate
from tailtune.trainers.evaluation.validation import OnValidation
from tailtune.trainers.export import check_export
from tailtune.trainers.processes.console_log import warnings_later
from tailtune.trainers.run import Outcome, run_to_outcome
from tailtune.trainers.runs.run_folder import RunFolder


def run_stages(stages: Sequence[CfgNode], on_validation: OnValidation | None = None) -> Outcome:
    """Run the stages one after another. Stages that are already finished are skipped.

    Args:
        stages: the configs of all stages, as `load_configs` returns them.
        on_validation: gets each validation of the last stage on the first process, and returns whether the training
            shall stop after it.

    Returns:
        Where the last stage has left its files.

    Raises:
        UserError: invalid input.
        Interrupted: a signal or `on_validation` requested a stop; the state has been saved.
    """
    last = stages[-1]
    finished = last.resume and RunFolder(last).finished()
    earlier = [] if last.test_only or finished else stages[:-1]  # otherwise the earlier stages need no training
    stages = [*earlier, last]
    if not finished:  # for a finished run, `run` validates the evaluation; a stored result needs no data
        with warnings_later():
            validate(stages, trains=not last.test_only, here=True)
    else:
        check_export(last.export, last.export_fp16, last.push_to_hub)
    for cfg in stages:
        RunFolder(cfg).check_owner()
    folder: Path | None = None
    for cfg in earlier:
        folder = run_to_outcome(cfg, folder).folder
    return run_to_outcome(last, folder, on_validation)
