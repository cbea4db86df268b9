"""`predictions`: the method `predict` of a loaded run. It computes what the command `predict` writes."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.datasets.sources.given_paths import given_paths
from tailtune.datasets.sources.image_sources import FileSource, Source
from tailtune.datasets.sources.opened_images import OpenedImages
from tailtune.trainers.evaluation.inference import Logits
from tailtune.trainers.labeller import Labeller, config_to_label, problem_of
from tailtune.trainers.methods import Method
from tailtune.trainers.option_schema import declared
from tailtune.trainers.option_words import words_of
from tailtune.trainers.predict import collected
from tailtune.trainers.prediction.request import ModelRequest, check_threshold
from tailtune.trainers.prediction.tables import Row
from tailtune.trainers.storage.large_tensors import Scratch
from tailtune.trainers.trained_model import Given

log = logging.getLogger("tailtune")


@dataclass(frozen=True, eq=False)
class Prediction:
    """The prediction for an image, from `TrainedModel.predict`."""

    index: int
    """Position of the image among those that were given, after folders and patterns have become files."""
    path: str | None
    """The file; None for an image of Pillow that has none."""
    label: str
    """The most probable class, or `unsure`."""
    probability: float
    """Probability of the most probable class, from 0 to 1."""
    top: Sequence[tuple[str, float]]
    """At most five classes and their probabilities, the most probable first."""
    features: Tensor | None = field(default=None, repr=False)
    """The features before the classifier, float32 [D] on the CPU, or [E, D] if E experts have features of their own;
    None if they were not asked for."""


def predictions(
    folder: Path,
    method: Method,
    images: Given | Iterable[Given],
    options: Mapping[str, Any],
    threshold: float | None,
    embeddings: bool,
) -> Iterator[Prediction]:
    """As `TrainedModel.predict`.

    Args:
        folder: the run folder.
        method: its trained method, ready to predict.
        images, threshold, embeddings: as there.
        options: options of the evaluation, by their names on the command line.

    Raises:
        UserError: as there.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"predict: threshold must be a probability from 0 to 1, not {threshold:g}")
    source, paths = _source(images)
    cfg, checkpoint = config_to_label(ModelRequest(str(folder), options=words_of(options)), declared(), "predict")
    if embeddings and cfg.tte:
        raise UserError("predict: embeddings are of one view of an image; leave them out, or set tte to False")
    labeller = Labeller(cfg, checkpoint, method)
    check_threshold(threshold, labeller.predictor.class_names)
    num_workers = 0 if isinstance(source, OpenedImages) else cfg.num_workers
    return _computed(labeller, source, paths, threshold, embeddings, num_workers)


def _source(images: Given | Iterable[Given]) -> tuple[Source, Sequence[str | None]]:
    """The images, and the path of each."""
    given = [images] if isinstance(images, Given) else list(images) if isinstance(images, Iterable) else [images]
    wrong = next((each for each in given if not isinstance(each, Given)), None)
    if wrong is not None:
        kind = type(wrong).__name__
        raise UserError(f"predict: give paths or images of Pillow, not {kind}; Image.fromarray makes one of an array")
    opened = [each for each in given if isinstance(each, Image.Image)]
    if opened and len(opened) < len(given):
        raise UserError("predict: give either paths or images of Pillow, not both")
    if opened:
        return OpenedImages(opened), [getattr(image, "filename", "") or None for image in opened]
    if not given:
        raise UserError("predict: no image was given")
    paths = given_paths([os.fspath(path) for path in given if not isinstance(path, Image.Image)])
    return FileSource(Path(), paths, np.zeros(len(paths), dtype=np.int64)), paths


def _computed(
    labeller: Labeller,
    source: Source,
    paths: Sequence[str | None],
    threshold: float | None,
    embeddings: bool,
    num_workers: int | None,
) -> Iterator[Prediction]:
    view, predictor, scratch = labeller.view(source), labeller.predictor, Scratch()
    features: dict[int, Tensor] = {}

    def compute() -> Iterator[Logits]:
        for batch in labeller.batches(view, num_workers, embeddings):
            for position in batch.unreadable:
                log.warning("%s", problem_of(view, position))
            if batch.features is not None:
                features.update(zip(batch.logits.index.tolist(), batch.features, strict=True))
            yield batch.logits

    batches = compute()
    found = collected(batches, len(view), scratch) if predictor.estimates else None
    used = predictor.frequencies(found, scratch)
    for part in batches if found is None else [found]:
        for places, tops in predictor.most_probable(predictor.log_odds(part, used)):
            for position, top in zip(part.index[places].tolist(), tops, strict=True):
                row = Row.of(paths[position] or "", top, threshold)
                yield Prediction(position, paths[position], row.label, top[0][1], top, features.pop(position, None))
