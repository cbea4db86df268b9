"""SADE's test-time adaptation: weights of the experts for a test set, learnt without its labels (for `ADAPTS`).

Method of Zhang et al. (2022, section 4.2). The experts were trained for different class frequencies. An expert that
fits the test set predicts two views of an image most alike, so the weights maximise that similarity. The network is
not changed. Its logits are computed once, for all test sets that share the images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.configs.seeding import generator
from tailtune.datasets.data_bundle import TestDistribution
from tailtune.trainers.distributed import on_main
from tailtune.trainers.evaluation.adaptation import BatchOptions, Learnt, of_predictions
from tailtune.trainers.evaluation.inference import Logits, rows_of
from tailtune.trainers.evaluation.rows import MadeRows, Rows
from tailtune.trainers.methods.base import combine

LEAST = 0.05
"""Learning stops once a weight, rounded to hundredths, is below this: that expert hardly contributes any more."""
AT_ONCE = 2**19
"""Number of logits of a part of a batch. Its gradient is computed at once, while the logits are in the cache of a
processor core: that takes half the time."""


@dataclass(frozen=True)
class Recipe(BatchOptions):
    """The hyper-parameters of learning. A learner with more options derives its `Options` from this class."""

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
    """The objective −S − factor · H, with p = softmax(Σ_e a_e z_e), and the similarity S.

    S = mean_b cos(p_b(v₁), p_b(v₂)). H = −Σ_v mean_{b,c} p log p; as in the original, H is a mean over classes too.
    This form takes little more time than reading the logits; `F.cosine_similarity` takes twice as long. The original
    clamps |p| to at least 1e-6; that never takes effect, because |p| ≥ 1/√C.

    Args:
        views: logits of two views of each image [B, 2, E, C].
        weights: weight a of each expert [E].
        factor: factor on the entropy H.

    Returns:
        The objective and S, both scalars.
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
    """SADE: learns the expert weights for one test set in several passes over its images.

    Args:
        name: name of the test set. The order of the images depends only on this name, the seed and the pass.
        plain: logits of the images without random transforms.
        positions: positions of the test set's images in the split, [n].
        recipe: the hyper-parameters.
        learn: positions of the images from which the weights are learnt, [l]; None: the images of the test set.
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
        self.known: Tensor | None = None
        """Weights of the experts that were learnt before, [E]; None: they are learnt now."""
        self.path: list[list[float]] = []
        """Weights of the experts in the course of learning, one list [E] a point."""
        self.similarity: list[float] = []
        """Mean S of each pass. S of an image is computed with the weights before the step that uses the image."""

    @property
    def weights(self) -> Tensor:
        """Weights of the experts, a = softmax(w) [E]; they sum to 1."""
        return self.w.detach().softmax(0) if self.known is None else self.known

    @property
    def running(self) -> bool:
        """Whether another pass is needed.

        Raises:
            UserError: the weights are not finite.
        """
        if not self.weights.isfinite().all():
            raise UserError(f"adapt: the weights for {self.name} are not finite; lower adapt_lr or adapt_weight_decay")
        return self.epoch < self.epochs and not (self.epoch and self.lowest < LEAST)

    @property
    def lowest(self) -> float:
        """The smallest weight, rounded to hundredths."""
        return min(round(weight, 2) for weight in self.weights.tolist())

    def learn(self, views: Logits) -> None:
        """One pass over the images, in batches of shuffled images.

        Args:
            views: logits of two views of every image of the split, [N, 2, E, C].
        """
        batches = self.batches()
        similarity = torch.zeros((), dtype=self.w.dtype)
        for number, batch in enumerate(batches, 1):
            rows = rows_of(views, batch)
            if len(rows):  # empty if the images have become unreadable since the plain pass
                similarity += len(batch) * self.step(views.logits, rows)
            self.after_step(batch, number, len(batches))
        self.similarity.append(float(similarity) / len(self.learns))
        self.epoch += 1

    def batches(self) -> Sequence[Tensor]:
        """Positions in the split of the images of each step; the last batch may be smaller."""
        draws = generator(self.recipe.seed, "adapt", self.name, self.epoch)
        return self.learns[torch.randperm(len(self.learns), generator=draws)].split(self.recipe.batch_size)

    def step(self, views: Rows, rows: Tensor) -> Tensor:
        """Take one optimizer step on the objective −S − factor · H.

        Args:
            views: logits of two views of each image [N, 2, E, C].
            rows: the rows of the images of the batch, int64 [B].

        Returns:
            S before the step, a scalar.
        """
        self.optimizer.zero_grad()
        total = torch.zeros((), dtype=self.w.dtype)
        for part in rows.split(max(1, AT_ONCE // prod(views.shape[1:]))):
            loss, similarity = objective(views[part], self.w.softmax(0), self.recipe.entropy)
            share = len(part) / len(rows)
            (share * loss).backward()
            total += share * similarity.detach()
        self.optimizer.step()
        return total

    def after_step(self, batch: Tensor, number: int, of: int) -> None:
        """Record the weights at the end of each pass.

        Args:
            batch: positions in the split of the images of the step.
            number: number of the step in its pass, counted from 1.
            of: number of steps in a pass.
        """
        if number == of:
            self.path.append(self.weights.tolist())

    def predictions(self) -> tuple[Rows, Tensor]:
        """Combined logits [n, C] of the test set, and the positions of their images in the split [n]."""
        return self.combined(self.positions, self.weights.expand(len(self.positions), -1))

    def combined(self, positions: Tensor, weights: Tensor) -> tuple[Rows, Tensor]:
        """As `predictions`, for images at given positions in the split [n], each with its own expert weights [n, E]."""
        logits, rows = self.plain.logits, rows_of(self.plain, positions)
        shape = (len(rows), logits.shape[-1])
        return MadeRows(shape, lambda part: combine(logits[rows[part]], weights[part])), self.plain.index[rows]

    def learnt(self) -> dict[str, Any]:
        """Everything that `restore` needs."""
        return {"weights": self.weights.tolist(), "path": self.path, "similarity": self.similarity}

    def restore(self, learnt: Learnt) -> None:
        """Take over what another learner of the same test set has learnt with the same options."""
        self.known, self.epochs = torch.tensor(learnt["weights"], dtype=self.w.dtype), 0
        self.path, self.similarity = learnt["path"], learnt["similarity"]

    def facts(self) -> dict[str, Any]:
        """The entries that metrics.json gets besides the metrics."""
        return {**Learner.learnt(self), "learnt_from": len(self.learns)}


class StreamLearner(Learner):
    """SADE's online version: the test images arrive as a stream, and each image is seen once.

    A batch is predicted right after the step on its views, and this prediction is evaluated. The weights are therefore
    always learnt from the test set itself; `learn` is ignored.
    """

    def __init__(
        self, name: str, plain: Logits, positions: Tensor, recipe: Recipe, learn: Tensor | None = None
    ) -> None:
        super().__init__(name, plain, positions, recipe)
        self.epochs = 1
        self.seen: list[tuple[Tensor, Tensor]] = []
        """Positions of the images of each batch so far [B], and the weights with which each is predicted [B, E]."""

    def after_step(self, batch: Tensor, number: int, of: int) -> None:
        """Fix the weights with which the batch is predicted, and record the weights after each tenth of the stream."""
        self.seen.append((batch, self.weights.expand(len(batch), -1)))
        if 10 * number // of > 10 * (number - 1) // of:
            self.path.append(self.weights.tolist())

    def predictions(self) -> tuple[Rows, Tensor]:
        positions, weights = zip(*self.seen, strict=True)
        return self.combined(torch.cat(positions), torch.cat(weights))

    def learnt(self) -> dict[str, Any]:
        return {**super().learnt(), "of_batches": [weights[0].tolist() for _, weights in self.seen]}

    def restore(self, learnt: Learnt) -> None:
        super().restore(learnt)
        of_batches = torch.tensor(learnt["of_batches"], dtype=self.w.dtype)
        for batch, weights in zip(self.batches(), of_batches, strict=True):
            self.seen.append((batch, weights.expand(len(batch), -1)))


def learners_of(
    kind: type[Learner],
    recipe: Recipe,
    plain: Logits | None,
    distributions: Sequence[TestDistribution],
    learnt: Mapping[str, Learnt] = MappingProxyType({}),
) -> dict[str, Learner]:
    """A learner for each test set.

    Args:
        kind: class of the learners.
        recipe: the hyper-parameters.
        plain: logits of the images without random transforms; None on every process but the first.
        distributions: the test sets.
        learnt: name of a test set → what was learnt for it before; its learner needs no pass.

    Returns:
        Name of a test set → its learner; empty on every process but the first.
    """
    if plain is None:
        return {}
    learners = {
        test.name: kind(test.name, plain, test.positions, recipe, test.learn_positions) for test in distributions
    }
    for name in learners.keys() & learnt.keys():
        learners[name].restore(learnt[name])
    return learners


def adapt(
    kind: type[Learner],
    recipe: Recipe,
    plain: Logits | None,
    distributions: Sequence[TestDistribution],
    passes: Callable[[int], Logits | None],
    accelerator: Accelerator,
    learnt: Mapping[str, Learnt] = MappingProxyType({}),
) -> dict[str, Learner]:
    """Learn the weights of all test sets in the same passes over the images. All processes must call this together.

    Args:
        kind, recipe, plain, distributions, learnt: as for `learners_of`.
        passes: number of a pass → logits of two views of every image of the split [N, 2, E, C]. It is called only
            while a learner needs another pass.
        accelerator: the processes.

    Returns:
        Name of a test set → its learner, after learning; empty on every process but the first.
    """
    learners, number = learners_of(kind, recipe, plain, distributions, learnt), 0
    while on_main(accelerator, lambda: any([learner.running for learner in learners.values()])):
        _one_pass(learners, passes(number))
        number += 1
    return learners


def _one_pass(learners: Mapping[str, Learner], views: Logits | None) -> None:
    """A separate function, so that one pass's logits are freed before the next is computed."""
    for learner in learners.values():
        if learner.running and views is not None:
            learner.learn(views)
