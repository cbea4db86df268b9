"""Compares rows of runs image by image, from the logits that their evaluations have stored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tailtune.datasets.long_tail import SHOT_GROUPS
from tailtune.trainers.comparison.finished_runs import run_folder
from tailtune.trainers.comparison.paired_tests import Paired, bootstrap, class_means, class_weights, mcnemar
from tailtune.trainers.comparison.rows import Row, masks_of
from tailtune.trainers.evaluation.logit_files import LOGITS, open_logits
from tailtune.trainers.evaluation.metrics import predictions_of
from tailtune.trainers.methods.base import combine
from tailtune.trainers.storage.atomic_io import FACTS, Damaged
from tailtune.trainers.storage.manifest import read_json


class Incomparable(Exception):
    """Two rows cannot be compared image by image. The message is the reason."""


@dataclass(frozen=True)
class Answers:
    """What the runs of a row answered to each test image."""

    images: str
    """Fingerprint of the split that was evaluated."""
    index: np.ndarray
    """Position of each image in the split, int64 [N]."""
    labels: np.ndarray
    """int64 [N]."""
    score: np.ndarray
    """Share of the runs that get an image right, fp64 [N]; 0 or 1 for a single run."""
    classes: int
    """Number C of classes."""
    runs: int = 1


def compare_with_first(rows: Sequence[Row]) -> list[Paired]:
    """Compare every row but the first one with the first one. At most two rows are in memory.

    Args:
        rows: rows of finished runs, with their folders.
    """
    if len(rows) < 2:
        return []
    found: list[Paired] = []
    try:
        first = _answers(rows[0])
    except Incomparable as error:
        return [Paired(row.name, None, f"{rows[0].name}: {error}") for row in rows[1:]]
    groups = _groups(rows[0])
    for row in rows[1:]:
        try:
            answers = _answers(row)
            _check_same(answers, first)
            found.append(_compare(row.name, answers, first, groups))
        except Incomparable as error:
            found.append(Paired(row.name, None, str(error)))
    return found


def names_of_classes(row: Row) -> list[str] | None:
    """The class names of the first run of a row; None if the run has stored none, as a zero-shot run."""
    try:
        stored: list[str] = read_json(run_folder(row.folders[0]) / "checkpoint" / FACTS)["class_names"]
    except (Damaged, KeyError):
        return None
    return stored


def _compare(name: str, ours: Answers, first: Answers, groups: Mapping[str, np.ndarray]) -> Paired:
    difference = ours.score - first.score
    differences = {"accuracy": bootstrap(difference)}
    for metric, mask in groups.items():
        chosen = mask[ours.labels]
        if chosen.any():
            differences[metric] = bootstrap(difference[chosen] * class_weights(ours.labels[chosen]))
    single = ours.runs == first.runs == 1
    test = mcnemar(ours.score > 0.5, first.score > 0.5) if single else None
    return Paired(name, differences, "", test, 100 * class_means(difference, ours.labels, ours.classes))


def _groups(row: Row) -> dict[str, np.ndarray]:
    """Metric of a group → whether each class is in the group, bool [C], as the first run of a row defines them.

    Empty if the run has not stored what defines them.
    """
    masks = masks_of(row.results[0])
    return {} if masks is None else {metric: masks[group] for metric, group in SHOT_GROUPS.items()}


def _answers(row: Row) -> Answers:
    """The answers of the runs of a row.

    Raises:
        Incomparable: logits are missing or damaged, or the runs of the row have different test images.
    """
    each = (_answers_of_run(folder) for folder in row.folders)
    total = next(each)
    for number, answers in enumerate(each, start=2):
        _check_same(answers, total)
        score = total.score + (answers.score - total.score) / number
        total = Answers(total.images, total.index, total.labels, score, total.classes, number)
    return total


def _answers_of_run(folder: Path) -> Answers:
    path = folder / LOGITS
    if not path.exists():
        raise Incomparable(f"{path} is missing; evaluate the run again")
    try:
        key, found = open_logits(path)
    except Damaged as error:
        raise Incomparable(str(error)) from error
    images = key.get("images")
    if not images:
        raise Incomparable(f"{path} does not tell which images were evaluated")
    predicted = predictions_of(found.logits, found.labels, combine).classes.numpy()
    labels = found.labels.numpy()
    score = (predicted == labels).astype(np.float64)
    return Answers(str(images), found.index.numpy(), labels, score, found.logits.shape[-1])


def _check_same(ours: Answers, first: Answers) -> None:
    """Check that two rows answered the same images.

    Raises:
        Incomparable: they did not.
    """
    if ours.images != first.images:
        raise Incomparable(f"other test images (fingerprint {ours.images[:8]}, not {first.images[:8]})")
    if not np.array_equal(ours.index, first.index):
        raise Incomparable(
            f"{len(ours.index):,} and {len(first.index):,} of the test images were evaluated, and not the same ones"
        )
    if ours.classes != first.classes or not np.array_equal(ours.labels, first.labels):
        raise Incomparable("the test images have other labels")
