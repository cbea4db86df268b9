"""SADE: experts for different test distributions (Zhang et al., NeurIPS 2022)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.configs.option import option
from tailtune.models import ClassificationModel
from tailtune.trainers.losses import LOSSES
from tailtune.trainers.methods.base import Batch, Method, Objective


@dataclass(frozen=True)
class Options:
    inverse_strength: float = option(
        2.0, "Strength with which the last expert prefers the classes that are rare in training."
    )


class Sade(Method):
    """Σ_e of the loss at z_e + a_e: each expert is the best one for a test distribution of its own (eq. 2 to 4).

    a = 0 (softmax: a test split as long-tailed as the training), log π (balanced softmax: a uniform one) and
    log π − τ log π̃ (a reversed one). The loss is the configured one, in the paper CE. Other numbers of experts stand
    evenly between these three, at t from 0 to 2: a_t = t log π up to 1, then log π − (t − 1) τ log π̃. One expert is
    the first.
    """

    Options = Options
    adjustments: Tensor

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any = None) -> None:
        super().__init__(model, objective, options)
        if objective.loss.adjusts:
            name = next(name for name, loss in LOSSES.items() if loss.function is objective.loss.function)
            raise UserError(f"loss_type {name} adjusts by the prior, and so does method sade itself: use loss_type CE")
        counts = objective.class_counts.double()
        prior = counts / counts.sum()
        log_prior, log_inverse = (prior + 1e-9).log(), (reversed_prior(prior) + 1e-9).log()  # 1e-9 as the original
        places = torch.linspace(0, 2, model.num_experts, dtype=prior.dtype, device=prior.device).unsqueeze(1)  # [E, 1]
        inverse = (places - 1).clamp_min(0) * self.options.inverse_strength * log_inverse
        self.register_buffer("adjustments", places.clamp_max(1) * log_prior - inverse, persistent=False)  # a [E, C]

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.loss_of_each(logits + self.adjustments.to(logits.dtype), batch)

    def assumed_prior(self) -> Tensor:
        """What the loss assumes is assumed of z_e + a_e."""
        return (super().assumed_prior() - self.adjustments.cpu()).log_softmax(1)


def reversed_prior(prior: Tensor) -> Tensor:
    """π̃ [C]: the k-th most frequent class gets the k-th smallest frequency (not 1/π).

    Of classes with equal counts the earlier label is the rarer one. The original's sort is not stable and leaves
    that open.
    """
    ascending, order = prior.sort(stable=True)
    rank = order.argsort()
    return ascending.flip(0)[rank]
