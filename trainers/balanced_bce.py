"""Balanced binary cross-entropy (Xu et al., CVPR 2023, arXiv 2212.02015)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from tailtune.configs.option import option
from tailtune.trainers.loss_entry import Prior, Sums, present


@dataclass(frozen=True)
class BalancedBCEOptions:
    """Balanced binary cross-entropy."""

    smoothing: float = option(
        0.1, "Share of a label that the loss BalBCE spreads over all classes.", least=0.0, most=1.0
    )


def balanced_bce(logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior, options: BalancedBCEOptions) -> Sums:
    """Each class against the rest: ℓ = Σ_c BCE(z_c + log π_c − log(1 − π_c), t_c), with the smoothed label t."""
    classes = logits.shape[1]
    odds = prior.log_prior - (-prior.log_prior.exp()).log1p()  # log π − log(1 − π) [C]
    targets = (1 - options.smoothing) * F.one_hot(labels, classes).to(logits.dtype) + options.smoothing / classes
    adjusted = present(logits, weights) + odds.to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(adjusted, targets, reduction="none").sum(1)
    return (losses * weights).sum(), weights.sum()
