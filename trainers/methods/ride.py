"""RIDE: experts that learn the same task and are rewarded for disagreeing (Wang et al., ICLR 2021)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.configs.option import option
from tailtune.models import ClassificationModel
from tailtune.trainers.losses import divergence, present
from tailtune.trainers.methods.base import Batch, Method, Objective


@dataclass(frozen=True)
class Options:
    diversity: float = option(
        -0.2,
        "Factor on each expert's divergence from the mean of the experts; 0 means one loss, of the mean logits.",
    )
    reweight_factor: float = option(
        0.02, "Strength with which temperatures follow the class counts from drw_epoch on; 0 means not at all."
    )


class Ride(Method):
    """Σ_e ( loss of z_e + λ τ̄² KL(softmax(z̄/τ) ‖ softmax(z_e/τ)) ), eq. 2 to 4, z̄ the mean, λ = `diversity` < 0.

    The loss is the configured one, in the paper LDAM with `drw_epoch`. τ is 1; from `drw_epoch` on it is a number for
    each class, τ_c = ω_c / max ω with ω_c = C π_c ρ + 1 − ρ, and τ̄ their mean: rare classes are made to differ more.
    With λ = 0 experts learn together: E times the loss of z̄.

    The divergence is a mean over samples while the loss is a mean by `sample_weights`. A `Step` has one weight, so
    where the two differ a step of several micro-batches has the mean of their divergences by those weights.
    """

    Options = Options
    depends_on_batch = True
    temperatures: Tensor

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any = None) -> None:
        super().__init__(model, objective, options)
        strength, counts = self.options.reweight_factor, objective.class_counts.double()
        spread = strength * counts / counts.mean() + 1 - strength  # ω [C]
        if spread.min() <= 0:
            raise UserError(f"ride.reweight_factor {strength} makes temperatures that are not above 0; try 0.02")
        self.register_buffer("temperatures", spread / spread.max(), persistent=False)

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = present(logits, batch["weight"])
        mean, diversity = self.aggregate(logits), self.options.diversity
        if diversity == 0:
            loss_sum, weight = self.loss_of(mean, batch)
            return logits.shape[1] * loss_sum, weight
        temperature = self.temperatures.to(logits.dtype) if self.deferred else logits.new_ones(())
        loss_sum, weight = self.loss_of_each(logits, batch)
        apart = [divergence(each, mean, batch["weight"], temperature) for each in logits.unbind(1)]
        return loss_sum + weight * diversity * torch.stack(apart).sum(), weight
