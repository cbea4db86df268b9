"""SADE: experts for different test distributions (Zhang et al., NeurIPS 2022)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailtune.configs.option import option
from tailtune.models import ClassificationModel
from tailtune.trainers.methods.base import Batch, Method, Objective


@dataclass(frozen=True)
class Options:
    inverse_strength: float = option(
        2.0, "Strength with which the last expert prefers the classes that are rare in training."
    )


class Sade(Method):
    """Loss: Σ_e L(z_e + a_e), where each expert is trained for a different test distribution (eq. 2 to 4).

    L is the configured loss; the paper uses CE. The three experts of the paper have these adjustments:

    - a = 0 (softmax), for test data that is as long-tailed as the training data;
    - a = log π (balanced softmax), for uniform test data;
    - a = log π − τ log π̃, for test data with reversed class frequencies.

    Other numbers of experts are placed evenly between these three at t from 0 to 2: a_t = t log π for t ≤ 1, and
    a_t = log π − (t − 1) τ log π̃ for t > 1. A single expert has a = 0.
    """

    Options = Options
    adjustments: Tensor

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any = None) -> None:
        super().__init__(model, objective, options)
        objective.refuse_adjusting_loss("sade")
        counts = objective.class_counts.double()
        prior = counts / counts.sum()
        log_prior, log_inverse = (prior + 1e-9).log(), (reversed_prior(prior) + 1e-9).log()  # 1e-9 as the original
        places = torch.linspace(0, 2, model.num_experts, dtype=prior.dtype, device=prior.device).unsqueeze(1)  # [E, 1]
        inverse = (places - 1).clamp_min(0) * self.options.inverse_strength * log_inverse
        self.register_buffer("adjustments", places.clamp_max(1) * log_prior - inverse, persistent=False)  # a [E, C]

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.loss_of_each(logits + self.adjustments.to(logits.dtype), batch)

    def assumed_prior(self) -> Tensor:
        """The prior that the loss assumes for z_e + a_e, minus the adjustment a_e, in logarithms [E, C]."""
        return (super().assumed_prior() - self.adjustments.cpu()).log_softmax(1)


def reversed_prior(prior: Tensor) -> Tensor:
    """The reversed prior π̃: the k-th most frequent class gets the k-th smallest frequency. This is not 1/π.

    Of two classes with equal counts, the one with the smaller label is treated as the rarer one. The original uses an
    unstable sort, so that the order of such classes is not defined there.

    Args:
        prior: class frequencies π [C].

    Returns:
        π̃ [C].
    """
    ascending, order = prior.sort(stable=True)
    rank = order.argsort()
    return ascending.flip(0)[rank]
