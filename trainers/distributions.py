"""A test set of any class frequencies, from the logits of the one pass over the balanced test set."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from configs import CfgNode
from datasets import DataInfo
from datasets.shifts import Shift, build_shifts
from trainers.evaluator import Logits, rows_of
from trainers.methods.base import combine
from trainers.metrics import evaluate

AS_IT_IS = "test"
"""Name of the test set itself, where weights are adapted and no other distribution is asked for."""

Results = dict[str, dict[str, Any]]


def distributions_of(cfg: CfgNode, info: DataInfo, labels: Tensor) -> tuple[Shift, ...]:
    """What `test_dists` asks for; where experts adapt and it asks for nothing, the test set as it is.

    Args:
        labels: of the test split, unreadable images included, [N].

    Raises:
        UserError: a distribution that is unknown or does not fit the data.
    """
    shifts = build_shifts(cfg, info, labels)
    if shifts or cfg.adapt is None:
        return shifts
    counts = torch.bincount(labels, minlength=info.num_classes)
    return (Shift(AS_IT_IS, counts, torch.arange(len(labels)), "the test images as they are"),)


def plain_results(found: Logits, shifts: Sequence[Shift], groups: Mapping[str, Tensor]) -> Results:
    """Every distribution by the mean of the experts, as `distributions` of metrics.json holds it."""
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
