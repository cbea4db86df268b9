"""LOSSES: sums over the samples of a micro-batch, never means.

A loss returns (Σ w_i ℓ_i, Σ w_i): the trainer adds both up over micro-batches and processes and divides once, so the
value does not depend on how a batch is cut.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Prior(NamedTuple):
    """What losses know of the training distribution, and their settings."""

    log_prior: Tensor  # [C] log of the class frequencies
    counts: Tensor  # [C] training images a class
    tau: float = 1.0
    """Strength of logit adjustment."""
    scale: float = 25.0
    """Factor of cosine logits, which LDAM's margins are multiplied with."""


Loss = Callable[[Tensor, Tensor, Tensor, Prior], tuple[Tensor, Tensor]]
"""logits [B, C], labels [B], sample weights [B], prior → (weighted sum, sum of weights), both scalars."""


def log_prior(class_counts: Tensor) -> Tensor:
    """log(n_c / Σ n) in fp32, [C]."""
    return (class_counts.double() / class_counts.sum()).log().float()


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior) -> tuple[Tensor, Tensor]:
    """ℓ = −log softmax(z)_y."""
    # where, and not the zero weight alone: a left-out sample's logits may be anything, and 0 · NaN is not 0.
    losses = F.cross_entropy(torch.where(weights.unsqueeze(-1) > 0, logits, 0.0), labels, reduction="none")
    return (losses * weights).sum(), weights.sum()


def logit_adjusted(logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior) -> tuple[Tensor, Tensor]:
    """ℓ = −log softmax(z + τ log π)_y (Menon et al. 2021, eq. 10)."""
    return cross_entropy(logits + prior.tau * prior.log_prior.to(logits.dtype), labels, weights, prior)


LOSSES: dict[str, Loss] = {"CE": cross_entropy, "LA": logit_adjusted}
BATCH_COUPLED: frozenset[str] = frozenset()
"""Losses whose value depends on which samples share a micro-batch."""
