"""RIDE: experts learn the same task, and a loss term rewards different predictions (Wang et al., ICLR 2021)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.configs.option import option
from tailtune.models import ClassificationModel
from tailtune.trainers.losses import present
from tailtune.trainers.methods.base import Batch, Method, Objective
from tailtune.trainers.methods.divergence import divergence


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
    """Loss: Σ_e (L(z_e) + λ τ̄² KL(softmax(z̄/τ) ‖ softmax(z_e/τ))), eq. 2 to 4, with λ = `diversity` < 0.

    z̄ is the mean of the experts' logits. L is the configured loss; the paper uses LDAM with `drw_epoch`. τ is 1 before
    `drw_epoch`. From then on each class has a temperature τ_c = ω_c / max ω with ω_c = C π_c ρ + 1 − ρ, and τ̄ is their
    mean. Rare classes have lower temperatures, so that the experts differ more on them. With λ = 0 the loss is E L(z̄).

    In one micro-batch the divergence is averaged by the weights of the batch, and L by `sample_weights`. A `Step` has
    only one weight. If the two weights differ, a step of several micro-batches therefore averages the divergences of
    its micro-batches by `sample_weights`.
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
        divergences = [divergence(expert, mean, batch["weight"], temperature) for expert in logits.unbind(1)]
        return loss_sum + weight * diversity * torch.stack(divergences).sum(), weight
