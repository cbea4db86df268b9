"""LGLA: local and global logit adjustments (Tao et al., ICCV 2023)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.configs.option import option
from tailtune.models import ClassificationModel
from tailtune.models.heads.classifiers import CosineClassifier
from tailtune.models.heads.expert_heads import heads_of
from tailtune.trainers.losses import cross_entropy, present
from tailtune.trainers.methods.base import Batch, Method, Objective


@dataclass(frozen=True)
class Options:
    tau: float = option(3.0, "Strength τ of the last expert's logit adjustment.")


class LGLA(Method):
    """Loss: Σ_e mean_i a_ie CE(z_e + b_e, y)_i. All experts but the last learn groups of classes, see `groups`.

    - Of an expert with a group, b is log π in its group, and log max π elsewhere. So it is balanced within the group,
      and the other classes are treated as the most frequent one.
    - Of the last expert, b = τ log π; with τ > 1 it prefers the rare classes.
    - a = 1 + max(0, θ − θ̄) is the weight of a hard sample: θ = arccos(z_y / s) is its angle to the row of its class,
      for logits of a cosine classifier with scale s. θ̄ is the mean angle of the samples of its group in the
      micro-batch.
    """

    Options = Options
    depends_on_batch = True
    adjustments: Tensor
    group_of_class: Tensor

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any = None) -> None:
        super().__init__(model, objective, options)
        if objective.loss.function is not cross_entropy:
            raise UserError("method lgla adjusts the logits itself: use loss_type CE")
        head = heads_of(model.head)[0]
        if not isinstance(head, CosineClassifier):
            raise UserError("method lgla weights samples by their angles: use classifier CosineClassifier")
        self.scale = head.scale
        counts = objective.class_counts.double()
        log_prior = (counts / counts.sum() + 1e-9).log()  # 1e-9 as the original
        of_class = groups(objective.class_counts, max(model.num_experts - 1, 1))
        local = torch.arange(model.num_experts - 1, device=of_class.device).unsqueeze(1)
        rows = torch.where(of_class == local, log_prior, log_prior.max())
        self.register_buffer("adjustments", torch.cat([rows, self.options.tau * log_prior[None]]), persistent=False)
        self.register_buffer("group_of_class", of_class, persistent=False)

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        adjusted = logits + self.adjustments.to(logits.dtype)
        hardness = self.hardness(logits, batch)
        terms = [
            self.loss_of(of_expert, {**batch, "weight": batch["weight"] * weights})[0]
            for of_expert, weights in zip(adjusted.unbind(1), hardness.unbind(1), strict=True)
        ]
        return torch.stack(terms).sum(), self.sample_weights(batch).sum()

    @torch.no_grad()
    def hardness(self, logits: Tensor, batch: Batch) -> Tensor:
        """The weights a [B, E], for logits [B, E, C]."""
        labels, weights = batch["label"], batch["weight"].to(logits.dtype)
        of_label = present(logits, batch["weight"]).gather(2, labels.view(-1, 1, 1).expand(-1, logits.shape[1], 1))
        angles = (of_label.squeeze(2) / self.scale).clamp(-1, 1).acos()  # θ [B, E]
        group = self.group_of_class[labels]
        members = torch.nn.functional.one_hot(group, len(self.adjustments)).to(logits.dtype) * weights.unsqueeze(1)
        means = members.T @ angles / members.sum(0).clamp_min(1e-12).unsqueeze(1)  # θ̄ [groups, E]
        return 1 + (angles - means[group]).clamp_min(0)

    def assumed_prior(self) -> Tensor:
        """The prior that CE assumes for z_e + b_e, minus b_e, in logarithms [E, C].

        An approximation: the weights of hard samples are neglected.
        """
        return (super().assumed_prior() - self.adjustments.cpu()).log_softmax(1)


def groups(counts: Tensor, number: int) -> Tensor:
    """Divide the classes into groups of about equally many images; group 0 has the most frequent classes.

    From the rarest class on, a group is complete when it has more than ⌊N / `number`⌋ images. Classes of equal counts
    are in one group. If a few classes have most of the images, there are fewer groups.

    Args:
        counts: number of training images of each class, whole numbers [C].
        number: number of groups.

    Returns:
        Index of the group of each class, int64 [C].
    """
    share, filled, last_counts = int(counts.sum()) // number, 0, []
    for count in counts.sort().values.tolist():
        filled += int(count)
        if filled > share:
            last_counts.append(count)
            filled = 0
    ends = torch.tensor(last_counts, dtype=counts.dtype, device=counts.device)
    return (counts.unsqueeze(1) <= ends).sum(1)
