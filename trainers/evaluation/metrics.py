"""Metrics of a long-tailed test, from fp32 logits; percentages 0–100, None where there is nothing to measure."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_stat_scores

from tailtune.datasets.long_tail import SHOT_GROUPS

Metrics = dict[str, Any]

FLOOR = 1e-3
"""In the harmonic mean a class accuracy (%) below this counts as this, as in LIFT; else one zero would hide all."""


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
    confidence = logits.softmax(-1).amax(-1), predictions == labels
    return {
        "accuracy": accuracy,
        "error_rate": 100 - accuracy,
        "macro_f1": float(f1[present].mean()),
        "mean_acc": float(recall[present].mean()),
        **{name: _mean(recall, groups[group], present) for name, group in SHOT_GROUPS.items()},
        "worst_case_acc": float(recall[present].min()),
        "hmean_acc": float(1 / (1 / recall[present].clamp_min(FLOOR)).mean()),
        "gmean_acc": float((recall[present] / 100).log().mean().exp() * 100),
        "ece": 100 * calibration_error(*confidence),
        "calibration": calibration(*confidence),
        "nll": float(F.cross_entropy(logits, labels)),
        "per_class_acc": [float(each) if there else None for each, there in zip(recall, present, strict=True)],
    }


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 10) -> float:
    """Σ_b n_b/N · |accuracy_b − confidence_b| over equal bins (a, b], the first one with 0, as LIFT.

    torchmetrics' bins are [a, b): there a confidence on an edge counts in the bin above, and one of exactly 1, which a
    scale of 100 makes common, in a bin of its own.

    Args:
        confidence: [N] in 0 … 1.
        correct: [N] bool.
    """
    _, hits, confidences = _binned(confidence, correct, bins)
    return float((hits - confidences).abs().sum()) / len(confidence)


def calibration(confidence: Tensor, correct: Tensor, bins: int = 15) -> Metrics:
    """The reliability diagram of MisLAS and H2T, and its expected and largest gap; None for a bin without samples.

    Args:
        confidence, correct: as of `calibration_error`.
    """
    counts, hits, confidences = _binned(confidence, correct, bins)
    gaps = 100 * (hits - confidences).abs()
    there = counts > 0
    return {
        "bins": bins,
        "ece": float(gaps.sum() / len(confidence)),
        "mce": float((gaps[there] / counts[there]).max()),
        "counts": [int(each) for each in counts],
        "accuracy": _percent(hits, counts),
        "confidence": _percent(confidences, counts),
    }


def _binned(confidence: Tensor, correct: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Number, sum of hits and sum of confidences of the samples in each of equal bins (a, b], fp64 [bins]."""
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    index = (torch.bucketize(confidence.double(), edges) - 1).clamp(0, bins - 1)
    sums = torch.zeros(3, bins, dtype=torch.float64, device=confidence.device)
    values = torch.stack([torch.ones_like(correct, dtype=torch.float64), correct.double(), confidence.double()])
    counts, hits, confidences = sums.index_add_(1, index, values).unbind()
    return counts, hits, confidences


def _percent(sums: Tensor, counts: Tensor) -> list[float | None]:
    return [float(100 * each / count) if count else None for each, count in zip(sums, counts, strict=True)]


def _mean(values: Tensor, classes: Tensor, present: Tensor) -> float | None:
    chosen = values[classes][present[classes]]
    return float(chosen.mean()) if len(chosen) else None
