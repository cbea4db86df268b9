"""LOSSES: every loss returns sums over the samples of a micro-batch, never means.

A loss returns (Σ w_i ℓ_i, Σ w_i). The trainer adds up the two sums over micro-batches and processes and divides once.
The value therefore does not depend on how a batch is split, except for entries with `couples` set.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tailtune.configs.option import option
from tailtune.models.heads.classifiers import ScaleOptions
from tailtune.trainers.balanced_bce import BalancedBCEOptions, balanced_bce
from tailtune.trainers.loss_entry import Loss, Prior, Sums, as_drawn, present, without_prior

__all__ = ["LOSSES", "Loss", "Prior", "Sums", "as_drawn", "present", "without_prior"]

CLOUD = 0.5
"""GCL: the largest change of a cosine by the noise, as in the authors' code for CIFAR."""


def log_prior(class_counts: Tensor) -> Tensor:
    """log(n_c / Σ n) in fp64 [C], from the numbers n of training images [C]."""
    return (class_counts.double() / class_counts.sum()).log()


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior) -> Sums:
    """Cross-entropy: ℓ = −log softmax(z)_y."""
    losses = F.cross_entropy(present(logits, weights), labels, reduction="none")
    return (losses * weights).sum(), weights.sum()


@dataclass(frozen=True)
class AdjustmentOptions:
    """Logit adjustment."""

    tau: float = option(1.0, "Strength τ of logit adjustment in the loss LA; 0 means plain cross-entropy.", key="tau")


def logit_adjusted(logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior, options: AdjustmentOptions) -> Sums:
    """Logit adjustment: ℓ = −log softmax(z + τ log π)_y (Menon et al. 2021, eq. 10)."""
    return cross_entropy(logits + options.tau * prior.log_prior.to(logits.dtype), labels, weights, prior)


def balanced_softmax(logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior) -> Sums:
    """Balanced softmax: ℓ = −log softmax(z + log π)_y (Ren et al. 2020).

    This is logit adjustment with τ = 1; the option `tau` has no effect on it.
    """
    return logit_adjusted(logits, labels, weights, prior, AdjustmentOptions(tau=1.0))


def focal(logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior) -> Sums:
    """Focal loss: ℓ = (1 − p_y)² · CE (Lin et al. 2017, eq. 4, γ = 2)."""
    losses = F.cross_entropy(present(logits, weights), labels, reduction="none")
    return ((1 - (-losses).exp()) ** 2 * losses * weights).sum(), weights.sum()


def ldam(logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior, options: ScaleOptions) -> Sums:
    """LDAM: CE with z_y replaced by z_y − s·m_y, m_c = ½ n_c^(−1/4) / max_k n_k^(−1/4) (Cao et al. 2019).

    The classifier has already scaled the logits by s = `scale`, so here s multiplies only the margin.
    """
    margins = prior.counts.to(logits.dtype) ** -0.25
    margins = 0.5 * options.scale * margins / margins.max()  # [C]
    shifted = logits.scatter_add(1, labels.unsqueeze(1), -margins[labels].unsqueeze(1))
    return cross_entropy(shifted, labels, weights, prior)


def class_balanced(logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior) -> Sums:
    """Weighted mean of CE, where w_y is the inverse effective number of images of class y (Cui et al. 2019)."""
    class_weights = effective_weights(prior.counts.float())  # fp32 as in LIFT; fp64 differs in the fifth digit
    return cross_entropy(logits, labels, weights * class_weights[labels], prior)


def reweighted(logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior) -> Sums:
    """Weighted mean of CE, where w_y ∝ 1/π_y (generalised re-weighting of Zhang et al. 2021 with ρ = 1)."""
    class_weights = 1 / prior.counts.to(logits.dtype)
    return cross_entropy(logits, labels, weights * (class_weights / class_weights.mean())[labels], prior)


@dataclass(frozen=True)
class SmoothingOptions:
    """Label-aware smoothing."""

    smooth_head: float = option(
        0.3,
        "Share of the label of the most frequent class that the loss LAS spreads over all classes.",
        key="smooth_head",
        least=0.0,
        most=1.0,
    )
    smooth_tail: float = option(
        0.0,
        "Share of the label of the rarest class that the loss LAS spreads over all classes.",
        key="smooth_tail",
        least=0.0,
        most=1.0,
    )


def label_aware_smoothed(
    logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior, options: SmoothingOptions
) -> Sums:
    """Label-aware smoothing of MisLAS (Zhong et al. 2021): ℓ = (1 − ε_y) CE + ε_y · mean_c(−log softmax(z)_c).

    Labels of frequent classes are smoothed more. Of the paper's variants this is the concave one:
    ε_c = ε_tail + (ε_head − ε_tail) sin(π/2 · (n_c − min n) / (max n − min n)).
    """
    counts = prior.counts.double()
    frequency = (counts - counts.min()) / (counts.max() - counts.min()).clamp_min(1)  # 0: rarest, 1: most frequent
    head, tail = options.smooth_head, options.smooth_tail
    smoothing = tail + (head - tail) * (frequency * math.pi / 2).sin()  # ε [C]
    sample_smoothing = smoothing.to(logits.dtype)[labels]  # [B]
    log_probs = present(logits, weights).log_softmax(1)
    losses = F.nll_loss(log_probs, labels, reduction="none") * (1 - sample_smoothing)
    losses = losses - sample_smoothing * log_probs.mean(1)
    return (losses * weights).sum(), weights.sum()


def gaussian_clouded(logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior, options: ScaleOptions) -> Sums:
    """GCL (Li et al., CVPR 2022): CE of s (cos_c − ½ |ε_c| m_c), m_c = (log max n − log n_c) / (log max n − log min n).

    ε ~ N(0, 1/3²), clamped to ±1, is drawn anew for every logit. |ε| and the factor ½ follow the authors' code. The
    classifier has already scaled the logits by s = `scale`, so here s multiplies only the term that is subtracted.
    """
    noise = torch.randn(logits.shape, generator=prior.draws("gcl"), device="cpu").div(3).abs().clamp(max=1)
    noisy = logits - moved(noise, logits.device).to(logits.dtype) * _clouds(prior, options).to(logits.dtype)
    return cross_entropy(noisy, labels, weights, prior)


def _clouds(prior: Prior, options: ScaleOptions) -> Tensor:
    """The largest amount that GCL subtracts from the logit of each class: ½ s m_c [C] in fp64."""
    log_counts = prior.counts.double().log()
    gaps = log_counts.max() - log_counts
    return options.scale * CLOUD * gaps / gaps.max().clamp_min(1e-12)


def lade(logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior) -> Sums:
    """LADE (Hong et al. 2021): balanced softmax + 0.1·E, E = −Σ_c π_c (T1_c − T2_c − 0.1·T2_c²).

    T1_c is the mean of z_c over the samples of class c. T2_c is the log of the mean of exp(z_c − log π_c − log C) over
    all samples.

    E is a statistic of the samples of one micro-batch; a sample of weight 2 counts as two samples. The returned sum
    contains 0.1·E times the total weight of the micro-batch. The loss of a step then contains the weighted mean of
    the estimates E of its micro-batches and processes. With smaller micro-batches, E is a different and noisier
    objective, because log is not linear and a class that is absent has no T1.
    """
    loss_sum, weight = balanced_softmax(logits, labels, weights, prior)
    logits = present(logits, weights)
    counts = prior.counts.to(logits.dtype)
    frequencies = counts / counts.sum()  # π [C]
    one_hot = F.one_hot(labels, len(counts)).to(logits.dtype) * weights.unsqueeze(1)  # weighted, [B, C]
    first = (one_hot * logits).sum(0) / (one_hot.sum(0) + 1e-8)  # T1 [C]
    # On a rank without a share of the batch all weights are 0. The term is 0 then, and its logarithms must be finite.
    is_empty = weight == 0
    log_weights = torch.where(is_empty, 0.0, weights.log()).unsqueeze(1)
    ratio = logits - (frequencies + 1e-9).log() + math.log(1 / len(counts) + 1e-9)
    second = (ratio + log_weights).logsumexp(0) - torch.where(is_empty, 1.0, weight).log()  # T2 [C]
    estimate = -(frequencies * (first - second - 0.1 * second**2)).sum()
    return loss_sum + 0.1 * weight * estimate, weight


def effective_weights(counts: Tensor) -> Tensor:
    """Class weights (1 − β) / (1 − β^n_c) with β = 0.9999, scaled to mean 1 (Cui et al. 2019).

    Args:
        counts: number n of training images of each class [C], in a floating-point dtype.

    Returns:
        Weights [C] in the dtype of `counts`.
    """
    weights = 1 / (1 - 0.9999**counts)
    return weights / weights.mean()


def moved(drawn: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to the device, without waiting for kernels still queued on the GPU."""
    return (drawn.pin_memory() if device.type == "cuda" else drawn).to(device, non_blocking=True)


LOSSES: dict[str, Loss] = {
    "CE": Loss(cross_entropy, as_drawn),
    "Focal": Loss(focal, as_drawn),  # approximate: the minimum is a flatter distribution than the posterior
    # Approximate: the margin depends on the label of the sample, so no class prior can express it.
    "LDAM": Loss(ldam, as_drawn, ScaleOptions()),
    "CB": Loss(class_balanced, lambda drawn, prior, _: drawn + effective_weights(prior.counts).log()),
    "GRW": Loss(reweighted, without_prior),
    "BS": Loss(balanced_softmax, without_prior, adjusts=True),
    "LA": Loss(
        logit_adjusted,
        lambda drawn, prior, options: drawn - options.tau * prior.log_prior,
        AdjustmentOptions(),
        adjusts=True,
    ),
    # Approximate: this neglects the term 0.1·E.
    "LADE": Loss(lade, without_prior, couples=True, adjusts=True, compares_all=True),
    # Approximate: each logit is right for its class against the rest, not for a softmax over all classes.
    "BalBCE": Loss(balanced_bce, without_prior, BalancedBCEOptions(), adjusts=True, compares_all=True),
    # Approximate: smoothing flattens predictions.
    "LAS": Loss(label_aware_smoothed, as_drawn, SmoothingOptions(), compares_all=True),
    # Approximate: the prior is computed with the mean of the noise. It couples the samples because the noise of a
    # sample depends on its position in the micro-batch.
    "GCL": Loss(
        gaussian_clouded,
        lambda drawn, prior, options: drawn + (2 / math.pi) ** 0.5 / 3 * _clouds(prior, options),
        ScaleOptions(),
        couples=True,
    ),
}
