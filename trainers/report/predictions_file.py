"""Writes `predictions.csv`: path, true class, predicted class and its probability of every image."""

import csv
import io
from pathlib import Path

from tailtune.trainers.report.subject import Subject
from tailtune.trainers.storage.atomic_io import Digest, write_bytes


def write_predictions(path: Path, subject: Subject) -> Digest:
    """Write the file, in the order of the split.

    Args:
        path: the file.
        subject: has the predictions.

    Raises:
        UserError: the file system refuses to write.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "true", "predicted", "probability"))
    found, names = subject.predicted, subject.class_names
    for position, label, guess, probability in zip(
        found.index.tolist(), found.labels.tolist(), found.classes.tolist(), found.confidence.tolist(), strict=True
    ):
        writer.writerow((subject.images.path(position), names[label], names[guess], f"{probability:.6f}"))
    return write_bytes(path, text.getvalue().encode(errors="surrogateescape"))
