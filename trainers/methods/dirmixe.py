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
"""Of the recycled pool, whatever the run's: the original's data set sets NumPy's stream to it."""


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
    """Test priors of one step."""

    experts: Tensor  # k [M], int64
    priors: Tensor  # w [M, C]


class DirMixE(Method):
    """mean_m ℓ_m + λ V₊, with ℓ_m the CE of expert k_m, adjusted for the test prior w_m: z − log((w/π)^p + 1e-9).

    Each step draws M pairs: k evenly, w ~ Dir(A b_k). b is π for the first expert, uniform for the middle one, π̃ (the
    reversed prior) for the last; others stand evenly between, at t from 0 to 2: b_t ∝ π^(1−t) up to 1, then π̃^(t−1).
    One expert is the uniform one. V₊ is the `semi_variance` over the draws, from the epochs after `warm` on.
    All micro-batches and processes of a step share its draws.
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
        """Whether V₊ counts."""
        self.recycled_draws: RecycledDraws | None = None
        self._last: tuple[tuple[int, int], Draws] | None = None

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
        each = adjusted_losses(logits, batch["label"], experts, ratios.to(logits.dtype))  # [B, M]
        weight = weights.sum()
        means = (each * weights.unsqueeze(1)).sum(0) / weight.clamp_min(1e-12)  # ℓ [M]
        value = means.mean()
        if self.final:
            value = value + self.options.variance * semi_variance(means)
        return weight * value, weight

    def drawn(self, device: torch.device) -> Draws:
        """The draws of this step, the same for all its micro-batches."""
        step = self.epoch, self.at_step
        if self._last is None or self._last[0] != step:
            found = (
                self._fresh() if self.recycled_draws is None else self.recycled_draws.at(self.epoch, self.at_step - 1)
            )
            self._last = step, Draws(*(moved(each, device) for each in found))
        return self._last[1]

    def assumed_prior(self) -> Tensor:
        """log of π (b_e/π)^p: what CE assumes is assumed of the adjusted logits, here for the middle of the draws."""
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
        counts, stream = self.objective.class_counts, np.random.RandomState(POOL_SEED)
        if self.options.pool == "recycled_cifar":
            for _ in counts:
                stream.shuffle(np.arange(int(counts.max())))
        bases = base_priors(counts, self.model.num_experts, torch.float32)
        return RecycledDraws((self.options.concentration * bases).numpy(), self.options.draws, per_epoch, stream)


class RecycledDraws:
    """The original's draws: those of an epoch, shuffled for each epoch. On the CPU, M · steps an epoch · C numbers.

    Args:
        alphas: of each component [E, C], float32 as the original computes them.
        draws: M.
        per_epoch: steps of an epoch.
        stream: NumPy's legacy numbers, which nothing else may draw from.
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
        """Draws of a step, counted from 0 over the whole run; who resumes repeats the shuffles of earlier epochs."""
        while self.shuffled <= epoch:
            self.stream.shuffle(self.order)
            self.shuffled += 1
        first = self.draws * (step % self.per_epoch)
        rows = self.order[first : first + self.draws]
        return Draws(torch.from_numpy(self.experts[rows]), torch.from_numpy(self.priors[rows]))


def base_priors(counts: Tensor, experts: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """b [E, C]. In fp32 those of three experts are bitwise the original's, which divides by the sum twice."""
    counts = counts.to(dtype)
    prior = counts / counts.sum()
    corners = prior, torch.full_like(prior, 1 / len(prior)), reversed_prior(prior)
    found = []
    for expert in range(experts):
        place = 2 * expert / (experts - 1) if experts > 1 else 1.0  # t
        first = min(int(place), 1)
        between = corners[first] ** (first + 1 - place) * corners[first + 1] ** (place - first)
        found.append(between / between.sum())
    return torch.stack(found)


def adjusted_losses(logits: Tensor, labels: Tensor, experts: Tensor, ratios: Tensor) -> Tensor:
    """−log softmax(z_k − log r)_y for every draw, [B, M], without a tensor [B, M, C].

    log Σ_c e^(z_c − log r_c) is a product of e^z and 1/r. Experts are chosen by a product too, since the gradient of
    an index adds up in any order on a GPU.

    Args:
        logits: z of every expert [B, E, C].
        labels: y [B].
        experts: k [M].
        ratios: r [M, C].
    """
    top = logits.detach().amax(2, keepdim=True)  # [B, E, 1]
    sums = torch.einsum("bec,mc->bem", (logits - top).exp(), 1 / ratios)
    own = logits.gather(2, labels.view(-1, 1, 1).expand(-1, logits.shape[1], 1))  # [B, E, 1]
    chosen = torch.nn.functional.one_hot(experts, logits.shape[1]).T.to(logits.dtype)  # [E, M]
    return ((sums.log() + top - own) * chosen).sum(1) + ratios.log()[:, labels].T


def semi_variance(losses: Tensor) -> Tensor:
    """V₊ = Σ (ℓ_m − ℓ̄)² over the draws with ℓ_m > ℓ̄, divided by their number − 1 (at least 1); losses [M]."""
    above = (losses - losses.mean()).clamp_min(0)
    return above.square().sum() / ((above > 0).sum() - 1).clamp_min(1)
