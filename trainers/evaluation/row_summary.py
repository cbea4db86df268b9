"""What metrics and checks need to know of the logits of each image, so that the logits are read once."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tailtune.trainers.evaluation.expert_usage import asked
from tailtune.trainers.evaluation.metrics import Metrics, Predictions, evaluate_predictions
from tailtune.trainers.evaluation.rows import Rows, slices
from tailtune.trainers.methods.base import combine

OF_EXPERT = ("accuracy", "many_acc", "med_acc", "few_acc", "ece", "nll")
"""The metrics that are measured of each expert by itself."""


@dataclass(frozen=True)
class RowSummary:
    """A summary of the logits [N, E, C] of N images."""

    predictions: Predictions
    """What the mean of the experts predicts."""
    asked: Tensor
    """Whether each expert computed each image, bool [N, E]."""
    finite: Tensor
    """Whether all logits of an expert for an image are finite, bool [N, E]."""
    experts: tuple[Predictions, ...]
    """What each of several experts predicts by itself; empty for one expert."""

    @classmethod
    def of(cls, logits: Rows, labels: Tensor) -> "RowSummary":
        """Read logits [N, E, C] once, a few rows at a time.

        Args:
            logits: the logits.
            labels: labels of the images [N].
        """
        found = cls.empty(tuple(logits.shape))
        for part in slices(logits):
            found.fill(part, logits[part], labels[part])
        return found

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> "RowSummary":
        """Room for the summary of logits of shape [N, E, C], of which `fill` fills in some rows."""
        count, experts, classes = shape
        used, finite = torch.zeros(2, count, experts, dtype=torch.bool)
        mean, *of_experts = (Predictions.empty(count, classes) for _ in range(1 + experts * (experts > 1)))
        return cls(mean, used, finite, tuple(of_experts))

    def fill(self, rows: slice | Tensor, logits: Tensor, labels: Tensor) -> None:
        """Set the summary of logits fp32 [n, E, C] of the images at some positions."""
        self.predictions.fill(rows, combine(logits), labels)
        self.asked[rows], self.finite[rows] = asked(logits), logits.isfinite().all(-1)
        for expert, found in enumerate(self.experts):
            found.fill(rows, logits[:, expert], labels)

    def at(self, rows: Tensor) -> "RowSummary":
        """The summary of the images at some positions int64 [n]."""
        experts = tuple(found.at(rows) for found in self.experts)
        return RowSummary(self.predictions.at(rows), self.asked[rows], self.finite[rows], experts)

    def expert_metrics(self, groups: Mapping[str, Tensor]) -> list[Metrics]:
        """The metrics `OF_EXPERT` of each of several experts that computed every image; empty for one expert.

        Args:
            groups: `many`, `med`, `few` → class indices.
        """
        measured = (evaluate_predictions(found, groups) for found in self.experts)
        return [{name: metrics[name] for name in OF_EXPERT} for metrics in measured]
