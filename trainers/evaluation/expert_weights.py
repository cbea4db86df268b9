"""Weights of the experts for a test set of unknown class frequencies, learnt without its labels: for `ADAPTS`.

SADE (Zhang et al. 2022, section 4.2): of experts that were trained for different class frequencies, those that fit the
test set change their prediction least between two views of an image. The network stays as it is and its logits are
computed once, for all test sets that share the images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tailtune.configs.seeding import generator
from tailtune.datasets.data_bundle import TestDistribution
from tailtune.trainers.distributed import on_main
from tailtune.trainers.evaluation.adaptation import BatchOptions, of_predictions
from tailtune.trainers.evaluation.inference import Logits, rows_of
from tailtune.trainers.methods.base import combine

LEAST = 0.05
"""A weight below this, rounded to hundredths, ends the learning: that expert has as good as no say."""
AT_ONCE = 4096
"""Images whose logits are combined together, so that no copy of all logits is made."""


@dataclass(frozen=True)
class Recipe(BatchOptions):
    """How weights are learnt. A learner with more options derives its `Options` from this class."""

    epochs: int = of_predictions(
        5, "Number of passes of `adapt` over the views of the test images.", key="adapt_epochs", least=1, most=1000
    )
    lr: float = of_predictions(0.1, "Learning rate of the experts' weights in `adapt`.", key="adapt_lr", least=0.0)
    weight_decay: float = of_predictions(
        5e-4, "Weight decay of the experts' weights in `adapt`.", key="adapt_weight_decay", least=0.0
    )
    entropy: float = of_predictions(
        0.0, "Factor on the entropy of the predictions in the objective of `adapt`.", key="adapt_entropy"
    )


def objective(views: Tensor, weights: Tensor, factor: float = 0.0) -> tuple[Tensor, Tensor]:
    """(−S − factor · H, S) for p = softmax(Σ_e a_e z_e), both scalars.

    S = mean_b cos(p_b(v₁), p_b(v₂)); H = −Σ_v mean_{b,c} p log p, as in the original the mean over classes too. Written
    so that a step costs little more than reading the logits (`F.cosine_similarity` takes twice as long). The original
    bounds |p| from below by 1e-6, which it never comes near: |p| ≥ 1/√C.

    Args:
        views: logits of two views [B, 2, E, C].
        weights: a [E].
    """
    z = (weights @ views.permute(2, 0, 1, 3).flatten(1)).view(len(views), 2, -1)  # [B, 2, C]
    p = z.softmax(-1)
    norms = p.square().sum(-1).sqrt()
    similarity = ((p[:, 0] * p[:, 1]).sum(-1) / (norms[:, 0] * norms[:, 1])).mean()
    if not factor:
        return -similarity, similarity
    entropy = (z.logsumexp(-1) - (p * z).sum(-1)).sum(1).mean() / z.shape[-1]  # −Σ_c p log p = log Σ_c e^z − Σ_c p z
    return -similarity - factor * entropy, similarity


class Learner:
    """Weights for one test set, over several passes: SADE.

    Args:
        name: of the test set; its order is a function of it, the seed and the pass, whatever else is evaluated.
        plain: logits of the images as they are.
        positions: of the test set's images in the split, [n].
        recipe: how to learn.
        learn: positions of the images that the weights are learnt from, [l]; None: the test set's own.
    """

    Options: type[Recipe] = Recipe

    def __init__(
        self, name: str, plain: Logits, positions: Tensor, recipe: Recipe, learn: Tensor | None = None
    ) -> None:
        self.name, self.plain, self.recipe = name, plain, recipe
        self.positions = plain.index[rows_of(plain, positions)]  # without images that could not be read
        self.learns = self.positions if learn is None else plain.index[rows_of(plain, learn)]
        self.epoch, self.epochs = 0, recipe.epochs if len(self.learns) else 0
        experts = plain.logits.shape[1]
        self.w = torch.full((experts,), 1 / experts, dtype=plain.logits.dtype, requires_grad=True)
        self.optimizer = torch.optim.SGD(
            [self.w], recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
        )
        self.path: list[list[float]] = []
        """Weights on the way."""
        self.similarity: list[float] = []
        """Mean S of each pass, of every image before the step that it is part of."""

    @property
    def weights(self) -> Tensor:
        """a = softmax(w), [E]."""
        return self.w.detach().softmax(0)

    @property
    def running(self) -> bool:
        """Whether another pass is needed."""
        return self.epoch < self.epochs and not (self.epoch and self.lowest < LEAST)

    @property
    def lowest(self) -> float:
        return min(round(each, 2) for each in self.weights.tolist())

    def learn(self, views: Logits) -> None:
        """One pass, in batches of a shuffled order.

        Args:
            views: logits of two views of every image of the split, [N, 2, E, C].
        """
        batches = self.batches()
        similarity = torch.zeros((), dtype=self.w.dtype)
        for number, batch in enumerate(batches, 1):
            rows = rows_of(views, batch)
            if len(rows):  # none, where images have become unreadable since the plain pass
                similarity += len(batch) * self.step(views.logits.index_select(0, rows))
            self.after_step(batch, number, len(batches))
        self.similarity.append(float(similarity) / len(self.learns))
        self.epoch += 1

    def batches(self) -> Sequence[Tensor]:
        """Positions of the images of each step; the last batch may be smaller."""
        draws = generator(self.recipe.seed, "adapt", self.name, self.epoch)
        return self.learns[torch.randperm(len(self.learns), generator=draws)].split(self.recipe.batch_size)

    def step(self, views: Tensor) -> Tensor:
        """Minimise −S − factor · H by one step on views [B, 2, E, C]; returns S."""
        loss, similarity = objective(views, self.w.softmax(0), self.recipe.entropy)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return similarity.detach()

    def after_step(self, batch: Tensor, number: int, of: int) -> None:
        """Here the path has a point a pass."""
        if number == of:
            self.path.append(self.weights.tolist())

    def predictions(self) -> tuple[Tensor, Tensor]:
        """Combined logits [n, C] and the positions of their images in the split [n]."""
        return self.combined(self.positions)

    def combined(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """As `predictions`, for images at some positions [n]."""
        rows = rows_of(self.plain, positions)
        logits = [combine(self.plain.logits[part], self.weights) for part in rows.split(AT_ONCE)]
        return torch.cat(logits), self.plain.index[rows]

    def facts(self) -> dict[str, Any]:
        """For metrics.json."""
        learnt = {"weights": self.weights.tolist(), "path": self.path, "similarity": self.similarity}
        return {**learnt, "learnt_from": len(self.learns)}


class StreamLearner(Learner):
    """Weights while the test images come in, each of them seen once: SADE's online version.

    A batch is predicted right after the step on its views, and that prediction counts; so it learns from the test set
    itself, whatever images are set apart to learn from.
    """

    def __init__(
        self, name: str, plain: Logits, positions: Tensor, recipe: Recipe, learn: Tensor | None = None
    ) -> None:
        super().__init__(name, plain, positions, recipe)
        self.epochs = 1
        self.seen: list[tuple[Tensor, Tensor]] = []

    def after_step(self, batch: Tensor, number: int, of: int) -> None:
        """The path has a point each tenth of the stream."""
        self.seen.append(self.combined(batch))
        if 10 * number // of > 10 * (number - 1) // of:
            self.path.append(self.weights.tolist())

    def predictions(self) -> tuple[Tensor, Tensor]:
        logits, positions = zip(*self.seen, strict=True)
        return torch.cat(logits), torch.cat(positions)


def adapt(
    kind: type[Learner],
    recipe: Recipe,
    plain: Logits | None,
    distributions: Sequence[TestDistribution],
    passes: Callable[[int], Logits | None],
    accelerator: Accelerator,
) -> dict[str, Learner]:
    """Learn the weights of all test sets together.

    Args:
        plain: logits of the images as they are; None on processes that are not the first.
        passes: number of a pass → logits of its views, of every image of the split; asked only while a test set learns.

    Returns:
        Name → weights that are learnt; nothing on the other processes.
    """
    learners: dict[str, Learner] = {}
    if plain is not None:
        learners = {
            each.name: kind(each.name, plain, each.positions, recipe, each.learn_positions) for each in distributions
        }
    number = 0
    while on_main(accelerator, lambda: any(each.running for each in learners.values())):
        _one_pass(learners, passes(number))
        number += 1
    return learners


def _one_pass(learners: Mapping[str, Learner], views: Logits | None) -> None:
    """Of its own so that the logits of one pass are gone before the next one begins."""
    for each in learners.values():
        if each.running and views is not None:
            each.learn(views)
