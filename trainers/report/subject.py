"""What a report is about: the result of an evaluation, its predictions, and where the images and the curves are."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from yacs.config import CfgNode

from tailtune.configs import values_of
from tailtune.configs.errors import UserError, lookup, printable
from tailtune.configs.key import TEST, TRAIN
from tailtune.configs.program import program
from tailtune.datasets.build_records import build_records
from tailtune.datasets.data_settings import DataSettings, SplitSettings
from tailtune.datasets.long_tail import random_positions
from tailtune.datasets.sources.cifar import ARCHIVES
from tailtune.datasets.sources.image_sources import Source
from tailtune.datasets.sources.named_source import NamedSource
from tailtune.datasets.splits.choose_splits import choose_splits
from tailtune.datasets.splits.split_records import StoredSplits
from tailtune.datasets.table import DATASETS
from tailtune.trainers.export.run_command import command_of


@dataclass(frozen=True)
class EvaluatedImages:
    """The images of the evaluated split. Positions are those of `Predicted.index`."""

    split: str
    """`test` or `train`."""
    source: Source | None = None
    """None: the images are not there any more."""
    indices: np.ndarray | None = None
    """Positions of the images in the source, int64."""
    recorded: Sequence[str] = ()
    """Paths that the run has recorded, if there is no source; empty for built-in data."""

    def path(self, position: int) -> str:
        """Path of an image, as the lists of the run name it. An image without a path is `<split> <position>`."""
        if self.source is not None and self.indices is not None and isinstance(self.source, NamedSource):
            return str(self.source.paths[int(self.indices[position])])
        return self.recorded[position] if len(self.recorded) else f"{self.split} {position}"

    @classmethod
    def of(cls, cfg: CfgNode, kept: StoredSplits | None, split: str, fingerprint: str | None) -> "EvaluatedImages":
        """Look for the images of an evaluation that is finished. Nothing is downloaded, no image is read.

        Args:
            cfg: resolved config of the evaluation.
            kept: the splits that its run has stored.
            split: `test` or `train`.
            fingerprint: of the evaluated images. Other images are not taken.
        """
        try:
            records, chosen = build_records(cfg, kept)
            settings = DataSettings.of(cfg)
            archive = ARCHIVES.get(cfg.dataset)
            if chosen is None and (archive is None or (settings.folders.image_root() / archive.folder).is_dir()):
                available = lookup(DATASETS, cfg.dataset, "dataset").load(settings)
                chosen = choose_splits(SplitSettings.of(cfg), available, kept)
            if chosen is not None and records[split].fingerprint == fingerprint:
                found = chosen.by_name[split]
                taken = random_positions(len(found.indices), cfg.max_test_images)
                return cls(split, found.source, found.indices[taken])
        except UserError:  # the data have moved; the report then has no pictures
            pass
        record = kept.records.get(split) if kept else None
        if record is None or record.fingerprint != fingerprint or not record.paths:
            return cls(split)
        return cls(split, recorded=[record.paths[i] for i in random_positions(len(record.paths), cfg.max_test_images)])


@dataclass(frozen=True)
class Launch:
    """How the evaluation was started."""

    command: str
    config: str
    """The resolved options, as YAML."""

    @classmethod
    def of(cls, cfg: CfgNode, evaluates: bool) -> "Launch":
        """Read a resolved config.

        Args:
            cfg: the config.
            evaluates: the command evaluates a finished run.
        """
        words = command_of(cfg)
        words += ["test_only", "True"] if evaluates else []
        words += ["model_dir", str(cfg.model_dir)] if cfg.model_dir else []
        values = values_of(cfg, TRAIN, TEST)
        return cls(f"{program()} {shlex.join(words)}", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


@dataclass(frozen=True)
class Predicted:
    """Predictions for N images, as arrays [N]. With several experts, they are those of the mean."""

    labels: np.ndarray
    """Label of each image, int64."""
    classes: np.ndarray
    """Class with the largest logit, int64."""
    confidence: np.ndarray
    """Probability of this class, fp32."""
    index: np.ndarray
    """Position of each image in the evaluated split, int64."""


@dataclass(frozen=True)
class Subject:
    """Everything that a report shows."""

    result: Mapping[str, Any]
    """Content of metrics.json."""
    class_names: Sequence[str]
    """[C]."""
    groups: Mapping[str, np.ndarray]
    """`many`, `med`, `few` → class indices."""
    predicted: Predicted
    images: EvaluatedImages
    events: Path
    """Folder of the training's event files for TensorBoard; it need not exist."""
    launch: Launch

    @cached_property
    def names(self) -> list[str]:
        """Class names that can be shown: without control characters, and not longer than a line."""
        return [printable(name) for name in self.class_names]

    @cached_property
    def group_of(self) -> list[str]:
        """The shot group of each class [C]."""
        found = [""] * len(self.class_names)
        for group, classes in self.groups.items():
            for label in classes:
                found[int(label)] = group
        return found

    @cached_property
    def confusions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The entries of the confusion matrix that are not 0: labels, predicted classes, images; int64 [n]."""
        count = len(self.class_names)
        pairs, sizes = np.unique(self.predicted.labels * count + self.predicted.classes, return_counts=True)
        return pairs // count, pairs % count, sizes
