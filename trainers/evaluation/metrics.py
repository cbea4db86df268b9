"""Metrics of a long-tailed test. Percentages are 0–100; None means that no image was available.

The logits are read once, a few rows at a time, and give three numbers for each image (`Predictions`). All metrics, also
those of every other test distribution, are computed from these numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tailtune.datasets.long_tail import SHOT_GROUPS
from tailtune.trainers.evaluation.rows import Rows, slices

Metrics = dict[str, Any]

FLOOR = 1e-3
"""Lower bound of a class accuracy (%) in the harmonic mean, as in LIFT. Without it one class at 0 would make it 0."""


@dataclass(frozen=True)
class Predictions:
    """What the metrics need to know of the logits of N images."""

    labels: Tensor
    """Label of each image, int64 [N]."""
    classes: Tensor
    """Class with the largest logit, int64 [N]."""
    confidence: Tensor
    """Probability of this class, fp32 [N]."""
    nll: Tensor
    """Negative log-likelihood of the label in nats, fp32 [N]."""
    num_classes: int

    def at(self, rows: Tensor) -> "Predictions":
        """The predictions for some of the images.

        Args:
            rows: their positions, int64 [n].
        """
        labels, classes, confidence, nll = (t[rows] for t in (self.labels, self.classes, self.confidence, self.nll))
        return Predictions(labels, classes, confidence, nll, self.num_classes)

    @classmethod
    def empty(cls, count: int, num_classes: int) -> "Predictions":
        """Room for the predictions for N = `count` images, of which `fill` fills in some.

        Long loops that collect small results between large ones would leave holes in memory, which then grows.
        """
        labels, classes = torch.zeros(2, count, dtype=torch.int64)
        confidence, nll = torch.zeros(2, count)
        return cls(labels, classes, confidence, nll, num_classes)

    def fill(self, rows: slice | Tensor, logits: Tensor, labels: Tensor) -> None:
        """Set what logits fp32 [n, C] predict, for the images at some positions."""
        self.labels[rows], self.classes[rows] = labels, logits.argmax(-1)
        self.confidence[rows] = logits.softmax(-1).amax(-1)
        self.nll[rows] = F.cross_entropy(logits, labels, reduction="none")


def predictions_of(logits: Rows, labels: Tensor, combine: Callable[[Tensor], Tensor] | None = None) -> Predictions:
    """Read logits once, a few rows at a time.

    Args:
        logits: logits of the images [N, C], or what `combine` takes.
        labels: labels of the images [N].
        combine: makes logits [n, C] of some rows of `logits`, such as the mean over experts.
    """
    found = Predictions.empty(len(labels), logits.shape[-1])
    for part in slices(logits):
        rows = logits[part]
        found.fill(part, (rows if combine is None else combine(rows)).float(), labels[part])
    return found


def evaluate(logits: Rows, labels: Tensor, groups: Mapping[str, Tensor]) -> Metrics:
    """Compute all metrics of one test set from its logits [N, C]; see `evaluate_predictions`."""
    return evaluate_predictions(predictions_of(logits, labels), groups)


def evaluate_predictions(found: Predictions, groups: Mapping[str, Tensor]) -> Metrics:
    """Compute all metrics of one test set.

    Args:
        found: predictions for the images.
        groups: `many`, `med`, `few` → class indices. The accuracy of a group is the mean of the accuracies of those of
            its classes that occur in the test set.

    Returns:
        Name of a metric → value. `nll` is in nats; `calibration` is a dictionary, see the function of that name.
    """
    labels, predictions, count = found.labels, found.classes, found.num_classes
    counted = (labels[predictions == labels], predictions, labels)
    true_positive, predicted, support = (classes.bincount(minlength=count).double() for classes in counted)  # [C] each
    present = support > 0
    recall = 100 * true_positive / support  # NaN for an absent class; the code below reads only present classes
    f1 = 200 * true_positive / (predicted + support)
    accuracy = float(100 * true_positive.sum() / support.sum())
    confidence = found.confidence, predictions == labels
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
        "nll": float(found.nll.double().mean()),
        "per_class_acc": [float(value) if known else None for value, known in zip(recall, present, strict=True)],
    }


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 10) -> float:
    """Expected calibration error Σ_b n_b/N · |accuracy_b − confidence_b| over bins of equal width, as in LIFT.

    A bin is the interval (a, b]; the first bin also contains 0. The bins of torchmetrics are [a, b) instead: a
    confidence on an edge belongs to the bin above, and a confidence of exactly 1 to an extra bin. Confidences of
    exactly 1 are common with logits that are scaled by 100.

    Args:
        confidence: probability of the predicted class [N], 0 to 1.
        correct: whether the prediction is correct [N], bool.
        bins: number of bins.

    Returns:
        The error, 0 to 1.
    """
    _, hits, confidences = _binned(confidence, correct, bins)
    return float((hits - confidences).abs().sum()) / len(confidence)


def calibration(confidence: Tensor, correct: Tensor, bins: int = 15) -> Metrics:
    """The reliability diagram of MisLAS and H2T, with its expected (`ece`) and maximum (`mce`) calibration error in %.

    Args:
        confidence, correct, bins: as in `calibration_error`.

    Returns:
        Both errors, and for each bin the number of samples, the accuracy and the mean confidence in %. The last two are
        None for a bin without samples.
    """
    counts, hits, confidences = _binned(confidence, correct, bins)
    gaps = 100 * (hits - confidences).abs()
    filled = counts > 0
    return {
        "bins": bins,
        "ece": float(gaps.sum() / len(confidence)),
        "mce": float((gaps[filled] / counts[filled]).max()),
        "counts": [int(count) for count in counts],
        "accuracy": _percent(hits, counts),
        "confidence": _percent(confidences, counts),
    }


def _binned(confidence: Tensor, correct: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Number, sum of hits and sum of confidences of the samples in each bin (a, b] of equal width, fp64 [bins]."""
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    index = (torch.bucketize(confidence.double(), edges) - 1).clamp(0, bins - 1)
    sums = torch.zeros(3, bins, dtype=torch.float64, device=confidence.device)
    values = torch.stack([torch.ones_like(correct, dtype=torch.float64), correct.double(), confidence.double()])
    counts, hits, confidences = sums.index_add_(1, index, values).unbind()
    return counts, hits, confidences


def _percent(sums: Tensor, counts: Tensor) -> list[float | None]:
    return [float(100 * value / count) if count else None for value, count in zip(sums, counts, strict=True)]


def _mean(values: Tensor, classes: Tensor, present: Tensor) -> float | None:
    of_group = values[classes][present[classes]]
    return float(of_group.mean()) if len(of_group) else None
