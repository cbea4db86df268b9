"""What methods take and give: batches, steps, what they are told of the run, the mean of experts."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tailtune.configs.option import NoOptions
from tailtune.datasets.loading.samplers import SAMPLERS
from tailtune.trainers.losses import Loss, Prior, effective_weights, log_prior

__all__ = ["Batch", "NoOptions", "Objective", "Step", "combine"]

Batch = dict[str, Any]
"""`image` uint8 [B, 3, H, W], `label` [B], `weight` [B] (0: left out), `index` [B]; `partner` as image, see `pairs`."""


class Step(NamedTuple):
    """The outcome of one micro-batch. Sums, not means."""

    loss_sum: Tensor
    weight: Tensor
    logits: Tensor  # [B, C]


@dataclass(frozen=True)
class Objective:
    """What a method is told of the data, the loss and the run."""

    class_counts: Tensor  # [C]
    loss: Loss
    """The entry of LOSSES, with the run's options."""
    drw_epoch: int | None = None
    """From this epoch on (the first is 0) a sample's weight is multiplied by its class's `effective_weights`."""
    sampler: str = "shuffle"
    """Entry of SAMPLERS that training draws its images by."""
    epochs: int = 1
    """That the run trains for, or begins; 0: it trains nothing."""
    seed: int = 0
    """Of the initial weights of what a method has beside its model, and of what it draws while it trains."""

    def assumed(self) -> Tensor:
        """log p [C] in fp64: the class prior of which the logits are the posterior once the loss is at its least.

        That of the samples as they are drawn and weighted, less what the loss itself takes off; uniform where nothing
        is trained: class means and text features prefer no class.
        """
        counts = self.class_counts.double()
        if not self.epochs:
            return torch.zeros_like(counts).log_softmax(0)
        drawn = SAMPLERS[self.sampler].frequencies(counts).log()
        if self.drw_epoch is not None and self.drw_epoch < self.epochs:
            drawn = drawn + effective_weights(counts).log()
        return self.loss.assumes(drawn, Prior(log_prior(counts), counts), self.loss.options).log_softmax(0)


def combine(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Logits of experts [B, E, C] → [B, C], by the weights [E], or the mean of those that were asked (not NaN)."""
    return logits.nanmean(1) if weights is None else (logits * weights.view(1, -1, 1)).sum(1)
