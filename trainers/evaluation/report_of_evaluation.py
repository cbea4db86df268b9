"""Writes the report of an evaluation. Whatever goes wrong there, the result is kept."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tailtune.configs.errors import printable
from tailtune.configs.program import program
from tailtune.datasets.data_bundle import DataInfo
from tailtune.trainers.evaluation.inference import Logits
from tailtune.trainers.report.files import REPORT, write_report
from tailtune.trainers.report.subject import EvaluatedImages, Launch, Predicted, Subject
from tailtune.trainers.runs.result_table import REPORTS
from tailtune.trainers.runs.run_folder import RunFolder

log = logging.getLogger("tailtune")


def predicted_of(found: Logits) -> Predicted:
    """What a report needs to know of the logits."""
    summary = found.summary.predictions
    return Predicted(summary.labels.numpy(), summary.classes.numpy(), summary.confidence.numpy(), found.index.numpy())


def add_report(
    folder: RunFolder,
    target: Path,
    result: dict[str, Any],
    found: Logits,
    info: DataInfo,
    images: Callable[[], EvaluatedImages],
    kind: str,
) -> str:
    """Write the report of an evaluation, before its metrics.json.

    The result took longer to compute than a report, so an error here becomes a note in it.

    Args:
        folder: the run's folder.
        target: the folder of the result.
        result: the content of metrics.json; receives the note.
        found: the logits of the evaluated images.
        info: facts about the data.
        images: finds the evaluated images.
        kind: `html` or `all`.

    Returns:
        A line for the log that says where the report is; empty if there is none.
    """
    try:
        if target == folder.path:
            folder.own(*REPORTS)
        groups = {name: classes.numpy() for name, classes in info.groups.items()}
        launch = Launch.of(folder.cfg, evaluates=target != folder.path)
        subject = Subject(
            result, info.class_names, groups, predicted_of(found), images(), folder.source / "tensorboard", launch
        )
        folder.seal(write_report(target, subject, kind))
    except Exception as error:  # of any library: hours of training must not be lost to a picture
        log.debug("the report", exc_info=True)
        text = f"no report ({type(error).__name__}: {printable(error)}); `{program()} report {target}` tries it again"
        log.warning("warning: %s", text)
        result["notes"].append(text)
        return ""
    return f"report {target / REPORT}\n"
