"""HEAD_INITS: what the classifier knows before the first step. Each returns the rows [C, D] of the head's weight."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.configs.seeding import generator
from tailtune.models.backbones.backbone_types import Text
from tailtune.models.backbones.prompts import Sentences

MAX_ITER = 100
log = logging.getLogger("tailtune")


@dataclass(frozen=True)
class HeadContext:
    """The training data, as seen by one process of a run.

    Args:
        features: iterates this process's share of the training images at some positions (None: of all) through the
            encoder without its tuners: features [B, D] and positions [B]. Unreadable images are left out.
        reduce: sum of a tensor over all processes.
        first: this is the process that does what one does for all.
    """

    labels: Tensor  # of all training images, int64 [N]
    num_classes: int
    dim: int
    seed: int
    device: torch.device
    features: Callable[[Tensor | None], Iterable[tuple[Tensor, Tensor]]]
    reduce: Callable[[Tensor], Tensor]
    first: bool = True


@dataclass(frozen=True)
class HeadInit:
    """An entry of HEAD_INITS with what it reads besides the training images.

    Args:
        text: None for an entry that reads no sentences.
    """

    rows: Callable[[HeadContext, Text | None, Sentences], Tensor]
    text: Text | None
    sentences: Sentences

    def __call__(self, context: HeadContext) -> Tensor:
        """The rows [C, D]."""
        return self.rows(context, self.text, self.sentences)


def text_feat(context: HeadContext, text: Text | None, sentences: Sentences) -> Tensor:
    """w_c = normalise(P·t_c): text features carried back through the visual projection (LIFT §3.3).

    Without a projection of `text`, when the encoder itself projects: w_c = t_c, which as in LIFT is a little shorter
    than one where it is the mean over several sentences. No pass over images.
    """
    assert text is not None, "a backbone without text tower was refused when the model was built"
    features = text.class_features(sentences, context.device)
    return features if text.projection is None else F.normalize(features @ text.projection.to(features), dim=-1)


def class_mean(context: HeadContext, *_: object, positions: Tensor | None = None) -> Tensor:
    """Mean of the raw features of a class, normalised; one pass over the training images, or those at `positions`.

    A class without images gets the mean of all.
    """
    sums = torch.zeros(context.num_classes, context.dim, dtype=torch.float64, device=context.device)
    counts = torch.zeros(context.num_classes, 1, dtype=torch.float64, device=context.device)
    for features, index in context.features(positions):
        labels = context.labels[index]
        sums.index_add_(0, labels, features.double())
        counts.index_add_(0, labels, counts.new_ones(len(labels), 1))
    sums, counts = context.reduce(sums), context.reduce(counts)
    _check_seen(int(counts.sum()), len(context.labels) if positions is None else len(positions))
    means = torch.where(counts > 0, sums / counts.clamp_min(1), sums.sum(0) / counts.sum())
    return F.normalize(means, dim=-1).float()


def _check_seen(seen: int, asked: int) -> None:
    """Raise a `UserError` where a head would be made of no image at all; every process knows the same numbers."""
    if not seen:
        raise UserError(f"init_head: none of the {asked} training images that it asks for can be read; check root")


def k_shot(context: HeadContext, *_: object, shots: int) -> Tensor:
    """`class_mean` of `shots` images a class, all of a class that has fewer; only those are encoded.

    Whoever asks for more shots of the same seed gets the same images and others.
    """
    order = torch.randperm(len(context.labels), generator=generator(context.seed, "shots"))
    labels = context.labels.cpu()
    order = order[labels[order].argsort(stable=True)]  # class by class, in random order
    counts = labels.bincount(minlength=context.num_classes)
    first = (counts.cumsum(0) - counts)[labels[order]]
    chosen = order[torch.arange(len(order)) - first < shots]
    return class_mean(context, positions=chosen.to(context.device))


def linear_probe(context: HeadContext, *_: object) -> Tensor:
    """Normalised coefficients of scikit-learn's logistic regression on the raw features; the intercept is dropped.

    One pass over the training images, then up to 100 iterations on the first process's CPU, minutes for ImageNet-LT;
    each process holds all features, the first one several times N·C numbers. A class without images gets the mean.
    """
    features = torch.zeros(len(context.labels), context.dim, device=context.device)
    seen = torch.zeros(len(context.labels), device=context.device)
    for some, index in context.features(None):
        features[index], seen[index] = some.float(), 1.0
    # Each image has its place, so the sum over processes is all of them, in one order for any number of processes.
    features, seen = context.reduce(features), context.reduce(seen) > 0
    _check_seen(int(seen.sum()), len(seen))
    if len(context.labels[seen].unique()) < 2:
        raise UserError("init_head linear_probe: only one class has an image that can be read; try class_mean")
    rows = torch.zeros(context.num_classes, context.dim, device=context.device)
    if context.first:
        rows += features[seen].mean(0)
        for label, row in _fit(features[seen], context.labels[seen]):
            rows[label] = row
    return F.normalize(context.reduce(rows), dim=-1)  # the same on every process, to the bit


def _fit(features: Tensor, labels: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The coefficients of each class that is there."""
    from joblib import cpu_count
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression  # takes seconds to import, and only this needs it
    from threadpoolctl import threadpool_limits

    model = LogisticRegression(max_iter=MAX_ITER, class_weight="balanced")
    # A launcher of several processes gives each one thread, and the others wait here. In double precision, because
    # the iterations magnify rounding.
    with threadpool_limits(cpu_count()), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # LIFT stops there too; the line below says it
        model.fit(features.double().cpu().numpy(), labels.cpu().numpy())
    log.info("linear_probe: the logistic regression ended after %d of %d iterations", model.n_iter_.max(), MAX_ITER)
    found = torch.from_numpy(model.coef_).to(features)
    if len(model.classes_) == 2:  # of which scikit-learn keeps the second one's row
        found = torch.cat([-found, found])
    return zip(model.classes_.tolist(), found, strict=True)


HEAD_INITS: dict[str, Callable[[HeadContext, Text | None, Sentences], Tensor]] = {
    "text_feat": text_feat,
    "class_mean": class_mean,
    "1_shot": partial(k_shot, shots=1),
    "10_shot": partial(k_shot, shots=10),
    "100_shot": partial(k_shot, shots=100),
    "linear_probe": linear_probe,
}
NEEDS_TEXT = frozenset({"text_feat"})
