"""How far predictions are from those of a teacher or another expert, for distillation and diversity."""

import torch.nn.functional as F
from torch import Tensor

from tailtune.trainers.losses import present


def divergence(logits: Tensor, target: Tensor, weights: Tensor, temperature: Tensor) -> Tensor:
    """Weighted mean over the samples of τ̄² KL(softmax(target/τ) ‖ softmax(logits/τ)) (Hinton et al. 2015).

    Args:
        logits: logits that get the gradient [B, C].
        target: logits of the target distribution [B, C]; they get no gradient.
        weights: weight of each sample [B]; a sample of weight 0 is left out.
        temperature: τ, a scalar or one value for each class [C]; τ̄ is its mean.

    Returns:
        A scalar.
    """
    logits, target = present(logits, weights), present(target.detach().to(logits.dtype), weights)
    log_probs, target_log_probs = ((values / temperature).log_softmax(1) for values in (logits, target))
    divergences = F.kl_div(log_probs, target_log_probs, reduction="none", log_target=True).sum(1)  # [B]
    return temperature.mean() ** 2 * (divergences * weights).sum() / weights.sum().clamp_min(1e-12)
