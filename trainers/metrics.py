"""Metrics of a long-tailed test, from fp32 logits; percentages 0–100, None where there is nothing to measure."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_stat_scores

Metrics = dict[str, Any]

FLOOR = 1e-3
"""In the harmonic mean a class accuracy (%) below this counts as this, as in LIFT; else one zero would hide all."""
GROUPS = {"many_acc": "many", "med_acc": "med", "few_acc": "few"}


def evaluate(logits: Tensor, labels: Tensor, groups: Mapping[str, Tensor]) -> Metrics:
    """All metrics of one test set.

    Args:
        logits: [N, C] fp32.
        labels: [N].
        groups: `many`, `med`, `few` → class indices. A group's accuracy is the mean over its classes in the test set.
    """
    count = logits.shape[1]
    logits, predictions = logits.float(), logits.argmax(-1)
    stats = multiclass_stat_scores(predictions, labels, count, average=None).double()  # [C, 5]
    true_positive, false_positive, _, false_negative, support = stats.unbind(1)
    present = support > 0
    recall = 100 * true_positive / support  # NaN for an absent class, which nothing below reads
    f1 = 200 * true_positive / (2 * true_positive + false_positive + false_negative)
    accuracy = float(100 * true_positive.sum() / support.sum())
    return {
        "accuracy": accuracy,
        "error_rate": 100 - accuracy,
        "macro_f1": float(f1[present].mean()),
        "mean_acc": float(recall[present].mean()),
        **{name: _mean(recall, groups[group], present) for name, group in GROUPS.items()},
        "worst_case_acc": float(recall[present].min()),
        "hmean_acc": float(1 / (1 / recall[present].clamp_min(FLOOR)).mean()),
        "gmean_acc": float((recall[present] / 100).log().mean().exp() * 100),
        "ece": float(multiclass_calibration_error(logits.softmax(-1), labels, count, n_bins=10)) * 100,
        "nll": float(F.cross_entropy(logits, labels)),
        "per_class_acc": [float(each) if there else None for each, there in zip(recall, present, strict=True)],
    }


def _mean(values: Tensor, classes: Tensor, present: Tensor) -> float | None:
    chosen = values[classes][present[classes]]
    return float(chosen.mean()) if len(chosen) else None
