"""A test set of any class frequencies, from the logits of the one pass over the balanced test set."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from datasets.bundle import Shift
from trainers.evaluator import Logits, rows_of
from trainers.methods.base import combine
from trainers.metrics import evaluate

Results = dict[str, dict[str, Any]]


def plain_results(found: Logits, shifts: Sequence[Shift], groups: Mapping[str, Tensor]) -> Results:
    """Every distribution by the mean of the experts, as `distributions` of metrics.json holds it."""
    if not shifts:
        return {}
    logits = combine(found.logits)
    classes = evaluate(logits, found.labels, groups)["per_class_acc"]
    results: Results = {}
    for shift in shifts:
        rows = rows_of(found, shift.positions)
        if not len(rows):  # few images, cut by max_test_images
            continue
        results[shift.name] = {
            "n": len(rows),
            "origin": shift.origin,
            "plain": evaluate(logits[rows], found.labels[rows], groups),
            "expected_accuracy": expected_accuracy(classes, shift.counts.tolist()),
        }
    return results


def expected_accuracy(classes: Sequence[float | None], counts: Sequence[int]) -> float | None:
    """Σ_k n_k · accuracy_k / Σ_k n_k: what a draw of n_k images of each class from the whole test set gives on average.

    Args:
        classes: accuracy of each class on the whole test set; None where it has no image.
        counts: n_k.
    """
    pairs = [(each, count) for each, count in zip(classes, counts, strict=True) if count]
    known = [(each, count) for each, count in pairs if each is not None]
    if not known or len(known) < len(pairs):
        return None
    return sum(each * count for each, count in known) / sum(count for _, count in known)
