"""What metrics and checks need to know of the logits of each image, so that the logits are read once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tailtune.trainers.evaluation.expert_usage import asked
from tailtune.trainers.evaluation.metrics import Predictions, predictions_of
from tailtune.trainers.evaluation.rows import Rows, slices
from tailtune.trainers.methods.base import combine


@dataclass(frozen=True)
class RowSummary:
    """A summary of the logits [N, E, C] of N images."""

    predictions: Predictions
    """What the mean of the experts predicts."""
    asked: Tensor
    """Whether each expert computed each image, bool [N, E]."""
    finite: Tensor
    """Whether all logits of an expert for an image are finite, bool [N, E]."""

    @classmethod
    def of(cls, logits: Rows, labels: Tensor) -> "RowSummary":
        """Read logits [N, E, C] once, a few rows at a time.

        Args:
            logits: the logits.
            labels: labels of the images [N].
        """
        parts = []
        for part in slices(logits):
            rows = logits[part]
            predictions = predictions_of(rows, labels[part], combine)
            parts.append(cls(predictions, asked(rows), rows.isfinite().all(-1)))
        return cls.joined(parts)

    @classmethod
    def joined(cls, parts: Sequence["RowSummary"]) -> "RowSummary":
        """The summary of the images of all parts, in their order."""
        return cls(
            Predictions.joined([part.predictions for part in parts]),
            torch.cat([part.asked for part in parts]),
            torch.cat([part.finite for part in parts]),
        )

    def at(self, rows: Tensor) -> "RowSummary":
        """The summary of the images at some positions int64 [n]."""
        return RowSummary(self.predictions.at(rows), self.asked[rows], self.finite[rows])
