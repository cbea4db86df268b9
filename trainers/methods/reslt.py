"""ResLT: experts for all classes, the less frequent and the rare ones (Cui et al., TPAMI 2022, arXiv 2101.10633)."""

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
    """(1 − β) L(Σ_e z_e) + β (Σ_e Σ_{i in group e} L(z_e)_i) / (Σ_e |group e|); the prediction is the sum Σ_e z_e.

    `head_logits` returns E·z_e for the logits z_e of the E heads, so that the mean over experts, which everything else
    takes for the prediction, is that sum.
    The groups of the experts lie in each other: all classes, those from `medium_from` on, those from `few_from` on.
    L is the configured loss, in the paper CE. The second term is a mean over members of the groups that are here, so
    a step of several micro-batches has the weighted mean of their own.
    """

    Options = Options
    depends_on_batch = True
    changes_head_logits = True
    members: Tensor

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any = None) -> None:
        super().__init__(model, objective, options)
        own, counts = self.options, objective.class_counts
        if model.num_experts != 3:
            raise UserError(
                f"method reslt has an expert for each of three groups of classes: set num_experts 3, not "
                f"{model.num_experts}"
            )
        starts = [round(share * len(counts)) for share in (0.0, own.medium_from, own.few_from)]
        if not 0 <= starts[1] <= starts[2] <= len(counts):
            raise UserError(
                f"reslt.medium_from {own.medium_from:g} and reslt.few_from {own.few_from:g} must rise within 0 to 1"
            )
        rank = counts.argsort(descending=True, stable=True).argsort()  # of each class, the most frequent is 0
        self.register_buffer("members", torch.stack([rank >= start for start in starts]), persistent=False)  # [E, C]

    def head_logits(self, features: Tensor) -> Tensor:
        """Features [B, D] or [B, E, D] → E times the logits of the heads [B, E, C]."""
        return self.model.num_experts * super().head_logits(features)

    def assumed_prior(self) -> Tensor:
        """Nearly: where the groups' share β prevails they have balanced the sum, so uniform; else that of the sum."""
        found = super().assumed_prior()
        return found if self.options.beta <= 0.5 else torch.zeros_like(found).log_softmax(1)

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        together, weight = self.loss_of(self.aggregate(logits), batch)
        inside = self.members[:, batch["label"]].to(batch["weight"].dtype)  # [E, B]
        apart = [
            self.loss_of(own, {**batch, "weight": batch["weight"] * member})
            for own, member in zip((logits / logits.shape[1]).unbind(1), inside, strict=True)
        ]
        losses, weights = (torch.stack(each).sum() for each in zip(*apart, strict=True))
        beta = self.options.beta
        return (1 - beta) * together + beta * weight * losses / weights.clamp_min(1e-12), weight
