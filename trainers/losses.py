"""LOSSES: sums over the samples of a micro-batch, never means.

A loss returns (Σ w_i ℓ_i, Σ w_i): the trainer adds both up over micro-batches and processes and divides once, so the
value does not depend on how a batch is cut, except where an entry `couples` the samples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tailtune.configs.option import option
from tailtune.configs.seeding import generator
from tailtune.models.heads.classifiers import ScaleOptions

CLOUD = 0.5
"""Of GCL: how far its noise moves a cosine at most, as its authors' code for CIFAR."""


class Prior(NamedTuple):
    """What losses know of the training distribution."""

    log_prior: Tensor  # [C] log of the class frequencies
    counts: Tensor  # [C] training images a class
    draws: Callable[[str], torch.Generator] = generator
    """What for → a CPU generator for one draw."""


Sums = tuple[Tensor, Tensor]
"""(weighted sum of the samples' losses, sum of the weights), both scalars."""


def as_drawn(drawn: Tensor, prior: Prior, options: Any) -> Tensor:
    """The prior of a loss that takes nothing off the class frequencies."""
    return drawn


@dataclass(frozen=True)
class Loss:
    """An entry of LOSSES, with its options. Called with (logits [B, C], labels [B], sample weights [B], prior)."""

    function: Callable[..., Sums]
    """(logits, labels, sample weights, prior) and the options, if it has some → sums."""
    assumes: Callable[[Tensor, Prior, Any], Tensor]
    """(log class frequencies of the samples as they are drawn and weighted [C], prior, options) → log class prior [C],
    up to a constant, of which softmax of the logits is the posterior at the loss's least. `target_prior` needs it."""
    options: Any = None
    """Its options, with their defaults in the table: an instance of a dataclass of `option`s, or None."""
    couples: bool = False
    """The value depends on which samples share a micro-batch."""
    adjusts: bool = False
    """It adjusts the logits by the class frequencies."""

    def __call__(self, logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior) -> Sums:
        given = () if self.options is None else (self.options,)
        return self.function(logits, labels, weights, prior, *given)


def log_prior(class_counts: Tensor) -> Tensor:
    """log(n_c / Σ n) in fp64, [C]."""
    return (class_counts.double() / class_counts.sum()).log()


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior) -> Sums:
    """ℓ = −log softmax(z)_y."""
    losses = F.cross_entropy(present(logits, weights), labels, reduction="none")
    return (losses * weights).sum(), weights.sum()


@dataclass(frozen=True)
class AdjustmentOptions:
    """Logit adjustment."""

    tau: float = option(1.0, "Strength τ of logit adjustment in the loss LA; 0 means plain cross-entropy.", key="tau")


def logit_adjusted(logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior, options: AdjustmentOptions) -> Sums:
    """ℓ = −log softmax(z + τ log π)_y (Menon et al. 2021, eq. 10)."""
    return cross_entropy(logits + options.tau * prior.log_prior.to(logits.dtype), labels, weights, prior)


def balanced_softmax(logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior) -> Sums:
    """ℓ = −log softmax(z + log π)_y (Ren et al. 2020): logit adjustment with τ = 1, whatever `tau` is."""
    return logit_adjusted(logits, labels, weights, prior, AdjustmentOptions(tau=1.0))


def focal(logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior) -> Sums:
    """(1 − p_y)² · CE (Lin et al. 2017, eq. 4, γ = 2)."""
    losses = F.cross_entropy(present(logits, weights), labels, reduction="none")
    return ((1 - (-losses).exp()) ** 2 * losses * weights).sum(), weights.sum()


def ldam(logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior, options: ScaleOptions) -> Sums:
    """CE with z_y − s·m_y, m_c = ½ n_c^(−1/4) / max_k n_k^(−1/4) (Cao et al. 2019).

    The logits are scaled already, so `scale` multiplies the margin only.
    """
    margins = prior.counts.to(logits.dtype) ** -0.25
    margins = 0.5 * options.scale * margins / margins.max()  # [C]
    shifted = logits.scatter_add(1, labels.unsqueeze(1), -margins[labels].unsqueeze(1))
    return cross_entropy(shifted, labels, weights, prior)


def class_balanced(logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior) -> Sums:
    """Mean of CE weighted by w_y, the inverse effective number of the class (Cui et al. 2019)."""
    of_class = effective_weights(prior.counts.float())  # as LIFT; fp64 differs in the fifth digit
    return cross_entropy(logits, labels, weights * of_class[labels], prior)


def reweighted(logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior) -> Sums:
    """Mean of CE weighted by w_y ∝ 1/π_y (generalised re-weighting of Zhang et al. 2021 with ρ = 1)."""
    of_class = 1 / prior.counts.to(logits.dtype)
    return cross_entropy(logits, labels, weights * (of_class / of_class.mean())[labels], prior)


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
    """(1 − ε_y) CE + ε_y · mean_c(−log softmax(z)_c), more smoothing of frequent classes (MisLAS, Zhong et al. 2021).

    ε_c = ε_tail + (ε_head − ε_tail) sin(π/2 · (n_c − min n) / (max n − min n)), the concave one.
    """
    counts = prior.counts.double()
    place = (counts - counts.min()) / (counts.max() - counts.min()).clamp_min(1)
    head, tail = options.smooth_head, options.smooth_tail
    smooth = tail + (head - tail) * (place * math.pi / 2).sin()  # ε [C]
    of_sample = smooth.to(logits.dtype)[labels]  # [B]
    logs = present(logits, weights).log_softmax(1)
    losses = F.nll_loss(logs, labels, reduction="none") * (1 - of_sample) - of_sample * logs.mean(1)
    return (losses * weights).sum(), weights.sum()


def gaussian_clouded(logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior, options: ScaleOptions) -> Sums:
    """CE of s (cos_c − ½ |ε_c| m_c), m_c = (log max n − log n_c) / max_k of it (GCL, Li et al., CVPR 2022).

    ε ~ N(0, 1/3²) within ±1, new for every logit; |ε| and the ½ are the authors' code's. The logits are scaled
    already, so `scale` multiplies what is taken from them.
    """
    noise = torch.randn(logits.shape, generator=prior.draws("gcl"), device="cpu").div(3).abs().clamp(max=1)
    clouded = logits - moved(noise, logits.device).to(logits.dtype) * _clouds(prior, options).to(logits.dtype)
    return cross_entropy(clouded, labels, weights, prior)


def _clouds(prior: Prior, options: ScaleOptions) -> Tensor:
    """What GCL takes from each class's logit at most, ½ s m_c [C] in fp64."""
    logs = prior.counts.double().log()
    gaps = logs.max() - logs
    return options.scale * CLOUD * gaps / gaps.max().clamp_min(1e-12)


def lade(logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior) -> Sums:
    """Balanced softmax + 0.1·E, E = −Σ_c π_c (T1_c − T2_c − 0.1·T2_c²) (Hong et al. 2021).

    T1_c = mean of z_c over the samples of class c; T2_c = log mean over all samples of exp(z_c − log π_c − log C).

    E is a statistic of the samples that are here together, where one of weight 2 counts as two. It is multiplied by
    their weight, so that over the micro-batches and processes of a step E becomes the weighted mean of their own
    estimates. Smaller shares are another, noisier objective (log is not linear, and a class that is absent has no T1).
    """
    loss_sum, weight = balanced_softmax(logits, labels, weights, prior)
    logits = present(logits, weights)
    counts = prior.counts.to(logits.dtype)
    frequencies = counts / counts.sum()  # π [C]
    here = F.one_hot(labels, len(counts)).to(logits.dtype) * weights.unsqueeze(1)  # [B, C]
    first = (here * logits).sum(0) / (here.sum(0) + 1e-8)  # T1 [C]
    # Nobody may be here, on a rank without a share: the term is 0 then, and its logarithms must be finite.
    nobody = weight == 0
    log_weights = torch.where(nobody, 0.0, weights.log()).unsqueeze(1)
    ratio = logits - (frequencies + 1e-9).log() + math.log(1 / len(counts) + 1e-9)
    second = (ratio + log_weights).logsumexp(0) - torch.where(nobody, 1.0, weight).log()  # T2 [C]
    estimate = -(frequencies * (first - second - 0.1 * second**2)).sum()
    return loss_sum + 0.1 * weight * estimate, weight


def effective_weights(counts: Tensor) -> Tensor:
    """(1 − β) / (1 − β^n_c), β = 0.9999, scaled to mean 1, in the precision of `counts` [C] (Cui et al. 2019)."""
    weights = 1 / (1 - 0.9999**counts)
    return weights / weights.mean()


def divergence(logits: Tensor, target: Tensor, weights: Tensor, temperature: Tensor) -> Tensor:
    """Mean over samples of τ̄² KL(softmax(target/τ) ‖ softmax(logits/τ)), a scalar (Hinton et al. 2015).

    Args:
        logits, target: [B, C]; the target gets no gradient.
        weights: [B], 0: left out.
        temperature: τ, a scalar or one for each class [C]; τ̄ is its mean.
    """
    logits, target = present(logits, weights), present(target.detach().to(logits.dtype), weights)
    own, other = ((each / temperature).log_softmax(1) for each in (logits, target))
    each = F.kl_div(own, other, reduction="none", log_target=True).sum(1)  # [B]
    return temperature.mean() ** 2 * (each * weights).sum() / weights.sum().clamp_min(1e-12)


def present(logits: Tensor, weights: Tensor) -> Tensor:
    """Zeros for a left-out sample, of logits [B, …]: they may be anything, and 0 · NaN is not 0."""
    return torch.where(weights.view(-1, *[1] * (logits.ndim - 1)) > 0, logits, 0.0)


def moved(drawn: Tensor, device: torch.device) -> Tensor:
    """What was drawn on the CPU, on the device, without waiting for what a GPU is still at."""
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)


def without_prior(drawn: Tensor, prior: Prior, options: Any) -> Tensor:
    """The prior of a loss that takes the training prior off."""
    return drawn - prior.log_prior


LOSSES: dict[str, Loss] = {
    "CE": Loss(cross_entropy, as_drawn),
    "Focal": Loss(focal, as_drawn),  # nearly: its least is not at the posterior itself, but flatter
    # Nearly: a margin is of the sample's own class, which no prior can say; rare classes have larger ones.
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
    "LADE": Loss(lade, without_prior, couples=True, adjusts=True),  # nearly: its second term has a small say
    "LAS": Loss(label_aware_smoothed, as_drawn, SmoothingOptions()),  # nearly: smoothing makes predictions flatter
    # Nearly: the prior is with the mean of the noise. Which noise a sample gets depends on its place in a micro-batch.
    "GCL": Loss(
        gaussian_clouded,
        lambda drawn, prior, options: drawn + (2 / math.pi) ** 0.5 / 3 * _clouds(prior, options),
        ScaleOptions(),
        couples=True,
    ),
}
