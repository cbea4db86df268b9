"""DirMixE: experts for test priors drawn from a mixture of Dirichlet distributions (Yang et al., ICML 2024)."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.configs.option import option
from tailtune.configs.seeding import derive_seed
from tailtune.models import ClassificationModel
from tailtune.trainers.losses import cross_entropy, log_prior, moved, present
from tailtune.trainers.methods.base import Batch, Method, Objective
from tailtune.trainers.methods.sade import reversed_prior

POOLS = ("fresh", "recycled", "recycled_cifar")
POOL_SEED = 0
"""Seed of the recycled pool, independent of the run's seed: the original's data set seeds NumPy with it."""


@dataclass(frozen=True)
class Options:
    power: float = option(1.3, "Exponent p with which logits follow a test prior over the training prior.", least=0.0)
    variance: float = option(5.0, "Factor λ on the semi-variance of the losses over test priors.", least=0.0)
    warm: float = option(0.8, "Share of the epochs that pass before the semi-variance counts.", least=0.0, most=1.0)
    concentration: float = option(
        10000.0, "Sum A of the parameters of each Dirichlet distribution; a larger one varies less."
    )
    draws: int = option(60, "Number M of test priors that are drawn for one optimizer step.", least=1, most=10**4)
    pool: str = option(
        "fresh",
        "Where test priors come from: new draws for each step (fresh), or an epoch's worth that is drawn once and "
        "shuffled, as in the original; `_cifar` begins where the original's choice of CIFAR's images leaves the random "
        "numbers.",
        choices=POOLS,
    )


class Draws(NamedTuple):
    """The pairs of expert and test prior that are drawn for one step."""

    experts: Tensor  # index k of the expert of each draw [M], int64
    priors: Tensor  # test prior w of each draw [M, C]


class DirMixE(Method):
    """Loss: mean_m ℓ_m + λ V₊, where ℓ_m is the CE of the adjusted logits z − log((w_m/π)^p + 1e-9) of expert k_m.

    Each step draws M pairs (k, w): k uniformly and w ~ Dir(A b_k). All micro-batches and processes of a step share the
    draws. The base prior b is π for the first expert, uniform for the middle one and the reversed prior π̃ for the last
    one. Other experts are placed evenly between them at t from 0 to 2, with b_t ∝ π^(1−t) for t ≤ 1 and
    b_t ∝ π̃^(t−1) for t > 1. A single expert has the uniform prior.

    V₊ is the `semi_variance` of ℓ over the draws. It is added only in the epochs after the share `warm`.
    """

    Options = Options
    depends_on_batch = True

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any = None) -> None:
        super().__init__(model, objective, options)
        if objective.loss.function is not cross_entropy:
            raise UserError("method dirmixe adjusts the logits itself: use loss_type CE")
        if self.options.concentration <= 0:
            raise UserError(f"dirmixe.concentration {self.options.concentration:g}: it must be above 0, such as 10000")
        self.final = False
        """Whether V₊ is added to the loss in the current epoch."""
        self.recycled_draws: RecycledDraws | None = None
        self._last: tuple[tuple[int, int], Draws] | None = None

    @property
    def depends_on_length(self) -> bool:
        return True

    def before_training(self, steps: int, per_epoch: int) -> None:
        super().before_training(steps, per_epoch)
        if self.options.pool != "fresh":
            self.recycled_draws = self.make_recycled_draws(per_epoch)

    def on_epoch(self, epoch: int, epochs: int) -> None:
        super().on_epoch(epoch, epochs)
        self.final = epoch + 1 > int(self.options.warm * (epochs + 1))  # as the original, whose epochs begin at 1

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, weights = present(logits, batch["weight"]), self.sample_weights(batch)
        experts, priors = self.drawn(logits.device)
        ratios = (priors.double() / self.log_prior.exp()) ** self.options.power + 1e-9  # 1e-9 as the original
        losses = adjusted_losses(logits, batch["label"], experts, ratios.to(logits.dtype))  # [B, M]
        weight = weights.sum()
        means = (losses * weights.unsqueeze(1)).sum(0) / weight.clamp_min(1e-12)  # ℓ [M]
        value = means.mean()
        if self.final:
            value = value + self.options.variance * semi_variance(means)
        return weight * value, weight

    def drawn(self, device: torch.device) -> Draws:
        """The draws of the current step, on `device`; they are the same for all its micro-batches."""
        step = self.epoch, self.at_step
        if self._last is None or self._last[0] != step:
            draws = (
                self._fresh() if self.recycled_draws is None else self.recycled_draws.at(self.epoch, self.at_step - 1)
            )
            self._last = step, Draws(*(moved(tensor, device) for tensor in draws))
        return self._last[1]

    def assumed_prior(self) -> Tensor:
        """log of π (b_e/π)^p for each expert [E, C], from the prior that CE assumes for the adjusted logits.

        The test prior is taken at b_e, the mean of the distribution from which it is drawn.
        """
        adjustments = self.options.power * (self._bases.log() - log_prior(self.objective.class_counts))
        return (super().assumed_prior() + adjustments).log_softmax(1)

    @cached_property
    def _bases(self) -> Tensor:
        return base_priors(self.objective.class_counts, self.model.num_experts)

    def _fresh(self) -> Draws:
        stream = np.random.default_rng(derive_seed(self.objective.seed, "priors", self.at_step))
        experts = stream.integers(len(self._bases), size=self.options.draws)
        alphas = (self.options.concentration * self._bases).numpy()
        priors = np.stack([stream.dirichlet(alphas[k]) for k in experts])
        return Draws(torch.from_numpy(experts), torch.from_numpy(priors))

    def make_recycled_draws(self, per_epoch: int) -> "RecycledDraws":
        """Draw the pool of one epoch with `per_epoch` steps, with the random numbers of the original code."""
        counts, stream = self.objective.class_counts, np.random.RandomState(POOL_SEED)
        if self.options.pool == "recycled_cifar":
            for _ in counts:
                stream.shuffle(np.arange(int(counts.max())))
        bases = base_priors(counts, self.model.num_experts, torch.float32)
        return RecycledDraws((self.options.concentration * bases).numpy(), self.options.draws, per_epoch, stream)


class RecycledDraws:
    """The draws of the original code: one pool of draws for an epoch, shuffled anew for each epoch.

    The pool is kept on the CPU and has M · (steps of an epoch) · C numbers.

    Args:
        alphas: parameters of the Dirichlet distribution of each expert [E, C], in fp32 as in the original.
        draws: number M of draws in a step.
        per_epoch: number of steps in an epoch.
        stream: NumPy's legacy generator. No other code may draw from it.
    """

    def __init__(self, alphas: np.ndarray, draws: int, per_epoch: int, stream: np.random.RandomState) -> None:
        size, self.draws, self.per_epoch, self.stream = draws * per_epoch, draws, per_epoch, stream
        self.experts = np.empty(size, np.int64)
        self.priors = np.empty((size, alphas.shape[1]), np.float32)
        for row in range(size):
            self.experts[row] = stream.randint(len(alphas))
            self.priors[row] = stream.dirichlet(alphas[self.experts[row]])
        self.order, self.shuffled = np.arange(size), 0

    def at(self, epoch: int, step: int) -> Draws:
        """The draws of a step, counted from 0 over the whole run. A resumed run repeats the shuffles of past epochs."""
        while self.shuffled <= epoch:
            self.stream.shuffle(self.order)
            self.shuffled += 1
        first = self.draws * (step % self.per_epoch)
        rows = self.order[first : first + self.draws]
        return Draws(torch.from_numpy(self.experts[rows]), torch.from_numpy(self.priors[rows]))


def base_priors(counts: Tensor, experts: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The base prior b of each expert, see `DirMixE`.

    With three experts and fp32 the result is bitwise that of the original, which divides by the sum twice.

    Args:
        counts: number of training images of each class [C].
        experts: number E of experts.
        dtype: dtype of the computation and of the result.

    Returns:
        b [E, C]; each row sums to 1.
    """
    counts = counts.to(dtype)
    prior = counts / counts.sum()
    corners = prior, torch.full_like(prior, 1 / len(prior)), reversed_prior(prior)
    bases = []
    for expert in range(experts):
        place = 2 * expert / (experts - 1) if experts > 1 else 1.0  # t
        first = min(int(place), 1)
        between = corners[first] ** (first + 1 - place) * corners[first + 1] ** (place - first)
        bases.append(between / between.sum())
    return torch.stack(bases)


def adjusted_losses(logits: Tensor, labels: Tensor, experts: Tensor, ratios: Tensor) -> Tensor:
    """Compute −log softmax(z_k − log r)_y for every sample and draw, without a tensor of size [B, M, C].

    Σ_c e^(z_c − log r_c) is computed as a matrix product of e^z and 1/r. The expert of a draw is selected by a product
    with a one-hot matrix, because the gradient of indexing is summed in a random order on a GPU.

    Args:
        logits: z of every expert [B, E, C].
        labels: y [B].
        experts: index k of the expert of each draw [M].
        ratios: r of each draw [M, C].

    Returns:
        Losses [B, M].
    """
    top = logits.detach().amax(2, keepdim=True)  # [B, E, 1]
    sums = torch.einsum("bec,mc->bem", (logits - top).exp(), 1 / ratios)
    label_logits = logits.gather(2, labels.view(-1, 1, 1).expand(-1, logits.shape[1], 1))  # [B, E, 1]
    chosen = torch.nn.functional.one_hot(experts, logits.shape[1]).T.to(logits.dtype)  # [E, M]
    return ((sums.log() + top - label_logits) * chosen).sum(1) + ratios.log()[:, labels].T


def semi_variance(losses: Tensor) -> Tensor:
    """V₊ = Σ (ℓ_m − ℓ̄)² / max(n − 1, 1), where the sum is over the n draws with ℓ_m > ℓ̄.

    Args:
        losses: ℓ [M].
    """
    above = (losses - losses.mean()).clamp_min(0)
    return above.square().sum() / ((above > 0).sum() - 1).clamp_min(1)
