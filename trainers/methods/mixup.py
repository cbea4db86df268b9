"""mixup: trains on weighted means of two images (Zhang et al., ICLR 2018, arXiv 1710.09412)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.configs.option import option
from tailtune.models import ClassificationModel
from tailtune.trainers.losses import moved
from tailtune.trainers.methods.base import Batch, Method, Objective, Step
from tailtune.trainers.methods.wrapper import Wrapper


@dataclass(frozen=True)
class Options:
    inner: str = option("classify", "Method whose loss is computed on the mixed images.", table="METHODS")
    alpha: float = option(
        1.0,
        "Parameter α of the Beta(α, α) distribution of an image's share in a mixed one; 0 means that nothing is mixed.",
        least=0.0,
    )


class Mixup(Wrapper):
    """Loss while training: λ L(z̃, y) + (1 − λ) L(z̃, y′), where z̃ are the logits of the images λ x + (1 − λ) x′.

    L is the loss of the inner method. x′ and y′ are a permutation of the micro-batch. λ ~ Beta(α, α) is the same for
    all samples of the micro-batch. A sample counts only if both of its images could be read. The returned logits are
    z̃, so the accuracy in the log compares z̃ with y.
    """

    Options = Options
    depends_on_batch = True
    can_be_wrapped = False

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any, inner: Method) -> None:
        super().__init__(model, objective, options, inner)
        if inner.loss_needs_images:
            raise UserError(
                f"mixup.inner {self.options.inner}: it would look at the images before they are mixed; choose another "
                "method, such as classify or ride"
            )

    def forward(self, batch: Batch) -> Step:
        if not self.training:
            return super().forward(batch)
        share, order = self.draw(len(batch["label"]))
        order = moved(order, batch["label"].device)
        logits = self.expert_logits(mixed(self.model.normalised(batch["image"]), share, order))
        batch = {**batch, "weight": batch["weight"] * batch["weight"][order]}
        loss_sum, weight = self.loss(logits, batch)
        other_sum, other_weight = self.loss(logits, {**batch, "label": batch["label"][order]})
        return self.step(
            share * loss_sum + (1 - share) * other_sum, share * weight + (1 - share) * other_weight, logits
        )

    def draw(self, count: int) -> tuple[float, Tensor]:
        """Draw λ and the order of the second images, for a micro-batch of `count` samples.

        λ is drawn by NumPy, because torch can draw from a Beta distribution only with its global generator.

        Returns:
            λ, and the order as positions in the micro-batch [B].
        """
        draws, alpha = self.draws("mixup"), self.options.alpha
        order = torch.randperm(count, generator=draws, device="cpu")
        seed = int(torch.randint(2**63 - 1, (), generator=draws, device="cpu"))
        return float(np.random.default_rng(seed).beta(alpha, alpha)) if alpha else 1.0, order


def mixed(images: Tensor, share: float, order: Tensor) -> Tensor:
    """Mix images: λ x + (1 − λ) x′.

    Args:
        images: normalised images x [B, …].
        share: λ, 0 to 1.
        order: position in the batch of the second image x′ of each sample [B].
    """
    return share * images + (1 - share) * images[order]
