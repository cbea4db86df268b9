"""HEAD_INITS: what the classifier knows before the first step. Each entry returns the weight [C, D] of the head."""

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
from tailtune.models.backbones.backbone_types import TextEncoder
from tailtune.models.backbones.prompts import Sentences

MAX_ITER = 100
log = logging.getLogger("tailtune")


EncodeTexts = Callable[[TextEncoder, Sentences, torch.device], Tensor]


def encode_texts(text_encoder: TextEncoder, sentences: Sentences, device: torch.device) -> Tensor:
    """The text features of the classes [C, d], computed now; see `TextEncoder.class_features`."""
    return text_encoder.class_features(sentences, device)


@dataclass(frozen=True)
class HeadContext:
    """The training data, as one process of a run sees them.

    Args:
        labels: labels of all N training images, int64 [N].
        num_classes: number C of classes.
        feature_dim: width D of the features.
        seed: seed of the run.
        device: where to compute.
        encode_images: positions of training images (None: all) → batches of features [B, D] and positions [B]. It runs
            the encoder without its tuners on this process's share of these images; unreadable images are left out.
        sum_over_processes: sums a tensor over all processes.
        collect_images: as `encode_images`, but the first process gets the images of all processes, on the CPU, and the
            others get none. None: there is one process.
        on_main: calls a function on the first process and returns its result, which is on the CPU, on all of them.
        encode_texts: text encoder, sentences of each class and device → text features of the classes [C, d].
    """

    labels: Tensor
    num_classes: int
    feature_dim: int
    seed: int
    device: torch.device
    encode_images: Callable[[Tensor | None], Iterable[tuple[Tensor, Tensor]]]
    sum_over_processes: Callable[[Tensor], Tensor]
    collect_images: Callable[[Tensor | None], Iterable[tuple[Tensor, Tensor]]] | None = None
    on_main: Callable[[Callable[[], Tensor]], Tensor] = lambda compute: compute()
    encode_texts: EncodeTexts = encode_texts


@dataclass(frozen=True)
class HeadInit:
    """An entry of HEAD_INITS, with what it reads besides the training images.

    Args:
        initial_weight: the entry.
        text_encoder: None for an entry that reads no text.
        sentences: one or more sentences of each class.
    """

    initial_weight: Callable[[HeadContext, TextEncoder | None, Sentences], Tensor]
    text_encoder: TextEncoder | None
    sentences: Sentences

    def __call__(self, context: HeadContext) -> Tensor:
        """The weight of the head, [C, D]."""
        return self.initial_weight(context, self.text_encoder, self.sentences)


def text_feat(context: HeadContext, text_encoder: TextEncoder | None, sentences: Sentences) -> Tensor:
    """Text features of the classes t_c, carried back through the visual projection P: w_c = normalise(P · t_c).

    If the encoder itself projects, w_c = t_c. As in LIFT, this is a little shorter than a unit vector where t_c is
    the mean over several sentences. No image is read. Source: LIFT, §3.3 (Shi et al. 2024).

    Args:
        context: the training data; only the device is used.
        text_encoder: encodes the sentences.
        sentences: one or more sentences of each class.

    Returns:
        The weight of the head, [C, D].
    """
    assert text_encoder is not None, "a backbone without text encoder was refused when the model was built"
    features = context.encode_texts(text_encoder, sentences, context.device)
    projection = text_encoder.projection
    return features if projection is None else F.normalize(features @ projection.to(features), dim=-1)


def class_mean(context: HeadContext, *_: object, positions: Tensor | None = None) -> Tensor:
    """The mean of the features of each class, normalised, from one pass over the training images.

    Args:
        context: the training data.
        positions: the training images to use, int64 [n]; None: all.

    Returns:
        The weight of the head, [C, D]. A class without images gets the mean over all images.

    Raises:
        UserError: none of the images can be read.
    """
    sums = torch.zeros(context.num_classes, context.feature_dim, dtype=torch.float64, device=context.device)
    counts = torch.zeros(context.num_classes, 1, dtype=torch.float64, device=context.device)
    for features, batch_positions in context.encode_images(positions):
        labels = context.labels[batch_positions]
        sums.index_add_(0, labels, features.double())
        counts.index_add_(0, labels, counts.new_ones(len(labels), 1))
    sums, counts = context.sum_over_processes(sums), context.sum_over_processes(counts)
    _check_seen(int(counts.sum()), len(context.labels) if positions is None else len(positions))
    means = torch.where(counts > 0, sums / counts.clamp_min(1), sums.sum(0) / counts.sum())
    return F.normalize(means, dim=-1).float()


def _check_seen(seen: int, wanted: int) -> None:
    """Raise a `UserError` if no image could be read. All processes know the same numbers, so all raise it."""
    if not seen:
        raise UserError(f"init_head: none of the {wanted} training images that it needs can be read; check root")


def k_shot(context: HeadContext, *_: object, shots: int) -> Tensor:
    """`class_mean` of some images of each class; only these are encoded.

    With the same seed, a larger number of shots takes the same images and some more.

    Args:
        context: the training data.
        shots: images of each class; a class that has fewer gives all of its images.

    Returns:
        The weight of the head, [C, D].
    """
    return class_mean(context, positions=some_of_each_class(context, shots))


def some_of_each_class(context: HeadContext, shots: int) -> Tensor:
    """Positions of up to `shots` random training images of each class, class by class, int64 [n]."""
    order = torch.randperm(len(context.labels), generator=generator(context.seed, "shots"))
    labels = context.labels.cpu()
    order = order[labels[order].argsort(stable=True)]  # class by class, in random order
    counts = labels.bincount(minlength=context.num_classes)
    class_start = (counts.cumsum(0) - counts)[labels[order]]  # where the class of each image begins in `order`
    chosen = order[torch.arange(len(order)) - class_start < shots]
    return chosen.to(context.device)


def linear_probe(context: HeadContext, *_: object, shots: int | None = None) -> Tensor:
    """Normalised coefficients of scikit-learn's logistic regression on the features, without the intercept.

    It takes one pass over the training images, then up to 100 iterations on the CPU of the first process, which are
    minutes for ImageNet-LT. This process alone holds all features, and several times N·C numbers.

    Args:
        context: the training data.
        shots: images of each class, as in `k_shot`; None: all.

    Returns:
        The weight of the head, [C, D]. A class without images gets the mean over all images.

    Raises:
        UserError: fewer than two classes have an image that can be read.
    """
    chosen = None if shots is None else some_of_each_class(context, shots)
    wanted = torch.arange(len(context.labels)) if chosen is None else chosen.cpu()
    batches = [(part.float().cpu(), at.cpu()) for part, at in (context.collect_images or context.encode_images)(chosen)]

    def fitted() -> Tensor:
        _check_seen(sum(len(at) for _, at in batches), len(wanted))
        positions, row = torch.cat([at for _, at in batches]), torch.empty(len(context.labels), dtype=torch.int64)
        row[wanted] = torch.arange(len(wanted))
        order = row[positions].argsort()  # one order for any number of processes
        features, labels = torch.cat([part for part, _ in batches])[order], context.labels.cpu()[positions[order]]
        if len(labels.unique()) < 2:
            raise UserError("init_head linear_probe: only one class has an image that can be read; try class_mean")
        weight = features.mean(0).repeat(context.num_classes, 1)
        for label, coefficients in _fit_logistic_regression(features, labels):
            weight[label] = coefficients
        return F.normalize(weight, dim=-1)

    return context.on_main(fitted).to(context.device)


def _fit_logistic_regression(features: Tensor, labels: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Label and coefficients [D] of each class that has images; features [N, D], labels [N]."""
    from joblib import cpu_count
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression  # takes seconds to import, and only this function needs it
    from threadpoolctl import threadpool_limits

    model = LogisticRegression(max_iter=MAX_ITER, class_weight="balanced")
    # A launcher gives each of its processes one thread, but the other processes wait meanwhile. Double precision,
    # because the iterations magnify rounding.
    with threadpool_limits(cpu_count()), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # LIFT stops after as many; the log line below says so
        model.fit(features.double().cpu().numpy(), labels.cpu().numpy())
    log.info("linear_probe: the logistic regression ended after %d of %d iterations", model.n_iter_.max(), MAX_ITER)
    coefficients = torch.from_numpy(model.coef_).to(features)
    if len(model.classes_) == 2:  # scikit-learn then keeps the row of the second class only
        coefficients = torch.cat([-coefficients, coefficients])
    return zip(model.classes_.tolist(), coefficients, strict=True)


HEAD_INITS: dict[str, Callable[[HeadContext, TextEncoder | None, Sentences], Tensor]] = {
    "text_feat": text_feat,
    "class_mean": class_mean,
    "1_shot": partial(k_shot, shots=1),
    "10_shot": partial(k_shot, shots=10),
    "100_shot": partial(k_shot, shots=100),
    "linear_probe": linear_probe,
    "100_shot_linear_probe": partial(linear_probe, shots=100),
}
"""Name, as `init_head` takes it → function that makes the weight of the head."""
NEEDS_TEXT = frozenset({"text_feat"})
"""Entries that read text, and so need a backbone with a text encoder."""
