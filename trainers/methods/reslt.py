"""ResLT: three experts, for all, for medium- and few-shot, and for few-shot classes (Cui et al., TPAMI 2022).

arXiv 2101.10633.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.configs.option import option
from tailtune.models import ClassificationModel
from tailtune.trainers.methods.base import Batch, Method, Objective


@dataclass(frozen=True)
class Options:
    beta: float = option(
        0.99,
        "Share of the experts' own losses in the whole loss; the rest is the loss of their sum.",
        least=0.0,
        most=1.0,
    )
    medium_from: float = option(
        0.35, "Share of the classes, the most frequent ones, that the second expert's own loss leaves out."
    )
    few_from: float = option(
        0.7, "Share of the classes, the most frequent ones, that the third expert's own loss leaves out."
    )


class ResLT(Method):
    """Loss: (1 − β) L(Σ_e z_e) + β (Σ_e Σ_{i in group e} L(z_e)_i) / (Σ_e |group e|). Prediction: Σ_e z_e.

    `head_logits` returns E·z_e for the logits z_e of the E heads. The mean over experts, which all other code uses as
    the prediction, then equals the sum Σ_e z_e.

    The classes are sorted by frequency. Group 1 has all classes, group 2 those from the share `medium_from` on, and
    group 3 those from the share `few_from` on. L is the configured loss; the paper uses CE.

    The second term is a mean over the group members in one micro-batch. A step of several micro-batches therefore has
    the weighted mean of the terms of its micro-batches.
    """

    Options = Options
    depends_on_batch = True
    changes_head_logits = True
    members: Tensor

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any = None) -> None:
        super().__init__(model, objective, options)
        opts, counts = self.options, objective.class_counts
        if model.num_experts != 3:
            raise UserError(
                f"method reslt has an expert for each of three groups of classes: set num_experts 3, not "
                f"{model.num_experts}"
            )
        starts = [round(share * len(counts)) for share in (0.0, opts.medium_from, opts.few_from)]
        if not 0 <= starts[1] <= starts[2] <= len(counts):
            raise UserError(
                f"reslt.medium_from {opts.medium_from:g} and reslt.few_from {opts.few_from:g} must rise within 0 to 1"
            )
        rank = counts.argsort(descending=True, stable=True).argsort()  # rank of each class; the most frequent has 0
        self.register_buffer("members", torch.stack([rank >= start for start in starts]), persistent=False)  # [E, C]

    def head_logits(self, features: Tensor) -> Tensor:
        """Features [B, D] or [B, E, D] → E times the logits of the heads [B, E, C]."""
        return self.model.num_experts * super().head_logits(features)

    def assumed_prior(self) -> Tensor:
        """An approximation: the prior of the configured loss for β ≤ ½, else uniform.

        With a large β the losses of the groups dominate, and they balance the sum of the logits.
        """
        log_prior = super().assumed_prior()
        return log_prior if self.options.beta <= 0.5 else torch.zeros_like(log_prior).log_softmax(1)

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        joint_loss, weight = self.loss_of(self.aggregate(logits), batch)
        in_group = self.members[:, batch["label"]].to(batch["weight"].dtype)  # [E, B]
        expert_sums = [
            self.loss_of(expert_logits, {**batch, "weight": batch["weight"] * member})
            for expert_logits, member in zip((logits / logits.shape[1]).unbind(1), in_group, strict=True)
        ]
        losses, weights = (torch.stack(values).sum() for values in zip(*expert_sums, strict=True))
        beta = self.options.beta
        return (1 - beta) * joint_loss + beta * weight * losses / weights.clamp_min(1e-12), weight
