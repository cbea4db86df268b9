"""Inputs and outputs of methods: batches, the objective, the result of a step, and the combination of experts."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.configs.option import NoOptions
from tailtune.datasets.loading.samplers import SAMPLERS
from tailtune.trainers.losses import LOSSES, Loss, Prior, effective_weights, log_prior

__all__ = ["Batch", "NoOptions", "Objective", "Step", "combine"]

Batch = dict[str, Any]
"""`image` uint8 [B, 3, H, W], `label` [B], `weight` [B] (0: left out), `index` [B] (position in the split).

With `pair_sampler` a batch also has `partner`, the second images, in the format of `image`, and their labels,
`partner_label` [B]. `other_image` and `other_partner` are further augmentations of both. With `sam focal` it has
`share` [B], the share of each sample's loss that `Step.shared_sum` holds.
"""


class Step(NamedTuple):
    """The result of one micro-batch: sums, not means."""

    loss_sum: Tensor  # weighted sum of the samples' losses, a scalar
    weight: Tensor  # sum of the weights, a scalar
    logits: Tensor  # predictions [B, C]
    shared_sum: Tensor | None = None  # sum of the samples' losses, weighted also by the batch's `share`; a scalar


@dataclass(frozen=True)
class Objective:
    """The data, the loss and the settings of the run, as far as a method needs them."""

    class_counts: Tensor  # number of training images of each class [C]
    loss: Loss
    """The entry of LOSSES, with the run's options."""
    drw_epoch: int | None = None
    """From this epoch on, counted from 0, the weight of a sample is multiplied by the `effective_weights` of its class.
    None: never."""
    sampler: str = "shuffle"
    """Entry of SAMPLERS that chooses the training images of an epoch."""
    epochs: int = 1
    """Number of training epochs that the run begins; 0: nothing is trained."""
    seed: int = 0
    """Random seed of the initial weights of the method's own modules, and of its random draws during training."""

    def refuse_adjusting_loss(self, method: str) -> None:
        """Raise a `UserError` if the loss adjusts the logits by the class frequencies, as the method itself does."""
        if self.loss.adjusts:
            name = next(name for name, loss in LOSSES.items() if loss.function is self.loss.function)
            raise UserError(
                f"loss_type {name} adjusts by the prior, and so does method {method} itself: use loss_type CE"
            )

    def assumed(self) -> Tensor:
        """log p [C] in fp64: the class prior for which softmax(logits) is the correct posterior after training.

        p depends on the sampler, the class weights and the loss. It is uniform if nothing is trained, because class
        means and text features prefer no class.
        """
        counts = self.class_counts.double()
        if not self.epochs:
            return torch.zeros_like(counts).log_softmax(0)
        drawn = SAMPLERS[self.sampler].frequencies(counts).log()
        if self.drw_epoch is not None and self.drw_epoch < self.epochs:
            drawn = drawn + effective_weights(counts).log()
        return self.loss.assumes(drawn, Prior(log_prior(counts), counts), self.loss.options).log_softmax(0)


def combine(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Combine the logits of the experts.

    Args:
        logits: [B, E, C]; NaN for experts that did not compute an image.
        weights: weight of each expert, [E] or for each image [B, E]; None: the mean over the experts whose logits are
            not NaN.

    Returns:
        Logits [B, C].
    """
    return logits.nanmean(1) if weights is None else (logits * weights.view(-1, logits.shape[1], 1)).sum(1)
