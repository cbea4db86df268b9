"""What methods take and give: batches, steps, what they are told of the run, the mean of experts."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from trainers.losses import Loss

Batch = dict[str, Any]
"""`image` uint8 [B, 3, H, W], `label` [B], `weight` [B] (0: left out), `index` [B]; `partner` as image, see `pairs`."""


class Step(NamedTuple):
    """The outcome of one micro-batch. Sums, not means."""

    loss_sum: Tensor
    weight: Tensor
    logits: Tensor  # [B, C]


@dataclass(frozen=True)
class NoOptions:
    """A method without options of its own."""


@dataclass(frozen=True)
class Objective:
    """What a method is told of the data, the loss and the run."""

    class_counts: Tensor  # [C]
    loss: Loss
    tau: float = 1.0
    scale: float = 25.0
    coupled: bool = False
    """The loss depends on which samples share a micro-batch."""
    drw_epoch: int | None = None
    """From this epoch on (the first is 0) a sample's weight is multiplied by its class's `effective_weights`."""
    seed: int = 0
    """Of the initial weights of what a method has beside its model, and of what it draws while it trains."""


def combine(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Logits of experts [B, E, C] → [B, C], by the weights [E], or the mean of those that were asked (not NaN)."""
    return logits.nanmean(1) if weights is None else (logits * weights.view(1, -1, 1)).sum(1)
