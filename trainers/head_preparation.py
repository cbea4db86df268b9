"""Initialises the head of a new method, from the features of the training images if the initialisation needs them."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

from tailtune.datasets.data_bundle import DataBundle
from tailtune.datasets.feature_view import FeatureView
from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.datasets.view import View
from tailtune.models import ClassificationModel
from tailtune.models.heads.head_init import EncodeTexts, HeadContext, encode_texts
from tailtune.trainers.distributed import gather_to_main, on_main
from tailtune.trainers.feature_store import FeatureStore
from tailtune.trainers.methods import Method

log = logging.getLogger("tailtune")

Part = Sequence[Tensor]
"""Features [B, D] of images, their positions [B], and which of them can be read [B]."""


@torch.no_grad()
def prepare_head(
    method: Method,
    data: DataBundle,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int | None,
    features: FeatureStore | None = None,
) -> None:
    """Run `method.prepare`; each process encodes its share of the training images, if the initialisation needs them.

    Args:
        method: the method, before its first step.
        data: the data of the run.
        accelerator: device and processes.
        batch_size: images that a process encodes at once.
        num_workers: processes that read images, for each process of the run; None chooses their number.
        features: gives features that are known already.
    """
    encoder = method.model.encoder

    def encoded(positions: Tensor | None) -> Iterator[Part]:
        """This process's share."""
        view = data.train_unaugmented if positions is None else data.train_unaugmented.take(positions.cpu().numpy())
        log.info("the head starts from features of %d training images", len(view))
        for found, index, real in _encoded(method.model, view, accelerator, batch_size, num_workers, features):
            yield found, index if positions is None else positions[index], real

    context = HeadContext(
        labels=data.train_unaugmented.labels.to(accelerator.device),
        num_classes=data.info.num_classes,
        feature_dim=encoder.feature_dim,
        seed=data.train_unaugmented.seed,
        device=accelerator.device,
        encode_images=lambda positions: _readable(encoded(positions)),
        sum_over_processes=lambda tensor: accelerator.reduce(tensor, "sum"),
        collect_images=lambda positions: _readable(_collected(accelerator, encoded(positions))),
        on_main=partial(on_main, accelerator),
        encode_texts=encode_texts if features is None else features.texts,
    )
    method.eval()
    with encoder.untuned():
        method.prepare(context)


def _encoded(
    model: ClassificationModel,
    view: View,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int | None,
    features: FeatureStore | None,
) -> Iterator[Part]:
    """This process's share of a view."""

    def encode(images: Tensor) -> Tensor:
        # Without tuners, all experts have the same pre-trained weights.
        return model.encoder.branch(model.encoder.trunk(model.normalised(images)), 0)

    view = view if features is None else features.untuned(model, view, encode)
    rank, world = accelerator.process_index, accelerator.num_processes
    for batch in eval_loader(view, batch_size, num_workers, rank, world, device=accelerator.device, title="head"):
        found = batch["image"] if isinstance(view, FeatureView) else encode(batch["image"])
        yield found, batch["index"], batch["weight"] > 0


def _collected(accelerator: Accelerator, parts: Iterable[Part]) -> Iterator[Part]:
    """On the first process, the parts of all processes, on the CPU; on the others nothing."""
    for part in parts:
        if (collected := gather_to_main(accelerator, part)) is not None:
            yield collected


def _readable(parts: Iterable[Part]) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and positions of the images that can be read."""
    for features, positions, real in parts:
        yield features[real], positions[real]


def text_context(
    model: ClassificationModel, num_classes: int, seed: int, device: torch.device, texts: EncodeTexts = encode_texts
) -> HeadContext:
    """What a head needs that is made of texts: no training images.

    Args:
        model: the model with the head.
        num_classes: number of classes.
        seed: seed of the run; it makes the heads of several experts differ.
        device: where to compute.
        texts: encodes them.
    """
    return HeadContext(
        labels=torch.empty(0, dtype=torch.int64, device=device),
        num_classes=num_classes,
        feature_dim=model.encoder.feature_dim,
        seed=seed,
        device=device,
        encode_images=lambda positions: iter(()),
        sum_over_processes=lambda tensor: tensor,
        encode_texts=texts,
    )
