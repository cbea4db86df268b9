"""Writes the files of a report. The libraries that it needs are imported here, when a report is made."""

from pathlib import Path
from typing import TYPE_CHECKING

from tailtune.trainers.runs.result_table import REPORTS
from tailtune.trainers.storage.atomic_io import Digest, write_bytes

if TYPE_CHECKING:
    from tailtune.trainers.report.subject import Subject

REPORT, PREDICTIONS, FIGURES = REPORTS
NONE, HTML, ALL = "none", "html", "all"
"""Values of the option `report`."""


def write_report(folder: Path, subject: "Subject", kind: str) -> dict[Path, Digest]:
    """Write `report.html` and `predictions.csv`, and for the kind `all` each figure as PNG and PDF in `figures/`.

    Args:
        folder: the folder of the result.
        subject: what the report shows.
        kind: `html` or `all`.

    Returns:
        File → its digest.

    Raises:
        UserError: the file system refuses to write.
    """
    from tailtune.trainers.report.figures import write_figures  # these import matplotlib and SciPy, in a second
    from tailtune.trainers.report.page import page
    from tailtune.trainers.report.predictions_file import write_predictions

    digests = {folder / PREDICTIONS: write_predictions(folder / PREDICTIONS, subject)}
    digests[folder / REPORT] = write_bytes(folder / REPORT, page(subject))
    return digests | (write_figures(folder / FIGURES, subject) if kind == ALL else {})
