"""Data sets: `build_info` for facts without images, `build_data` for images."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from yacs.config import CfgNode

from tailtune.configs.errors import UserError, lookup
from tailtune.datasets.data_bundle import DataBundle, DataInfo, View
from tailtune.datasets.images.transforms import (
    Transform,
    crop_resize,
    eval_transform,
    plain_transform,
    repeated,
    train_transform,
)
from tailtune.datasets.long_tail import capped_counts, check_hold_out, shot_groups
from tailtune.datasets.sources.available_images import Outline
from tailtune.datasets.sources.class_descriptors import class_descriptors
from tailtune.datasets.splits.choose_splits import ChosenSplits, choose, look, readable, records, without
from tailtune.datasets.splits.split_records import Record, StoredSplits
from tailtune.datasets.table import DATASETS, list_folders
from tailtune.datasets.test_distributions.build import build_shifts, shift_names

__all__ = [
    *("DATASETS", "DataBundle", "DataInfo", "View"),
    *("build_data", "build_info", "build_records"),
]


def build_info(cfg: CfgNode, counts: Sequence[int] | None = None) -> DataInfo:
    """Facts about the training data, from config and formulas where those say it all.

    Reads neither images nor network; lists and folders only of data that declare no `class_counts`. With
    `class_counts` the names may be placeholders, as they stand in the lists.

    Args:
        counts: training images per class of the run that is evaluated, where it has written them down.

    Raises:
        UserError: unknown data set or augmentation, missing list, or options that do not fit the data.
    """
    for key in ("augment", "adapt_views"):  # so that a dry run refuses unknown names
        train_transform(cfg[key], cfg.resolution, cfg.interpolation, key)
    return _info(cfg, lookup(DATASETS, cfg.dataset, "dataset").outline(cfg), counts)


def build_records(cfg: CfgNode, kept: StoredSplits | None = None) -> tuple[dict[str, Record], ChosenSplits | None]:
    """What each split is made of at present, by the sizes of its files; no image is opened, nothing is downloaded.

    Args:
        kept: splits of the run that is asked about.

    Raises:
        MissingData: a list or folder is not there. UserError: as `build_info`.
    """
    entry = lookup(DATASETS, cfg.dataset, "dataset")
    if entry.built_in:
        return {name: Record.built_in(cfg.dataset) for name in ("train", "test", "val")}, None
    chosen, _ = look(choose(cfg, entry.load(cfg), kept), headers=False)
    chosen = without(chosen, kept.unreadable if kept else ())
    return records(cfg, chosen, kept), chosen


def build_data(cfg: CfgNode, kept: StoredSplits | None = None, counts: Sequence[int] | None = None) -> DataBundle:
    """All views of a run. CIFAR is downloaded where it is missing, so let one process of a machine go first.

    Args:
        kept: splits that the run has written down: its hold-outs are taken over.
        counts: as in `build_info`; none: those of the training images at hand.

    Raises:
        UserError: as `build_info`; also missing images.
        UnreadableImages: files that are no images, unless `on_bad_image skip` leaves them out.
    """
    augmented = train_transform(cfg.augment, cfg.resolution, cfg.interpolation)
    data = lookup(DATASETS, cfg.dataset, "dataset").load(cfg)
    names = data.outline.class_names
    chosen = readable(cfg, choose(cfg, data, kept), kept, names)
    train, test, val = (chosen.splits.get(name) for name in ("train", "test", "val"))
    assert train is not None and test is not None
    own = np.bincount(train.source.labels[train.indices], minlength=len(names)).tolist()
    info = _info(cfg, data.outline, own if counts is None else counts)
    if cfg.prompt == "descriptor" and cfg.descriptors:
        info = replace(info, descriptors=class_descriptors(cfg.descriptors, list_folders(cfg), info.class_names))

    testing, views = _testing(cfg), train_transform(cfg.adapt_views, cfg.resolution, cfg.interpolation)
    skip = cfg.on_bad_image == "skip"
    training = View(train.source, train.indices, augmented, cfg.seed, skip)
    tested = View(test.source, test.indices, testing, cfg.seed, skip).limited(cfg.max_test_images)
    return DataBundle(
        info=info,
        train=training,
        plain=training.with_transform(plain_transform(cfg.resolution, cfg.interpolation)),
        train_as_test=training.with_transform(testing).limited(cfg.max_test_images),
        test=tested,
        test_views=View(tested.source, tested.indices, repeated(views, 2), cfg.adapt_seed, skip),
        val=None
        if val is None
        else View(val.source, val.indices, testing, cfg.seed, skip).limited(cfg.max_test_images),
        shifts=build_shifts(cfg, info, tested.labels),  # here, so that a wrong list is refused before training
        records=records(cfg, chosen, kept),
        chosen=chosen,
    )


def _info(cfg: CfgNode, outline: Outline, counts: Sequence[int] | None = None) -> DataInfo:
    shift_names(cfg)
    if len(outline.class_names) < 2:
        raise UserError(
            f"the data of '{cfg.data}' have one class only ({', '.join(outline.class_names)}), so there is nothing to "
            "tell apart; give at least two classes"
        )
    if counts is None:
        counts = capped_counts(outline.available, cfg.imb_factor)
        if cfg.val_per_class:
            check_hold_out(counts, cfg.val_per_class, outline.class_names, "val_per_class")
            counts = [count - cfg.val_per_class for count in counts]
    if min(counts) == 0:
        # Priors, margins and class means are undefined for such a class; a silent -inf or nan helps nobody.
        empty = list(counts).index(0)
        raise UserError(
            f"class '{outline.class_names[empty]}' (label {empty}) has no training image: add one, or raise imb_factor"
        )
    grouped = counts
    if cfg.group_imb_factor is not None:
        grouped = capped_counts(outline.available, cfg.group_imb_factor, "group_imb_factor")
    return DataInfo(
        name=cfg.data,
        class_names=outline.class_names,
        class_counts=torch.tensor(list(counts), dtype=torch.int64),
        groups=shot_groups(grouped, cfg.many_above, cfg.few_below),
        mean=outline.mean,
        std=outline.std,
    )


def _testing(cfg: CfgNode) -> Transform:
    """What one image of the test gives; the views of `tte` are cut from it by trainers/evaluation/tta.py."""
    if cfg.tte and cfg.tte_mode == "randaug":
        return repeated(train_transform(cfg.augment, cfg.resolution, cfg.interpolation), cfg.randaug_times)
    if cfg.tte:
        return crop_resize(cfg.resolution, cfg.expand, cfg.interpolation)
    return eval_transform(cfg.resolution, cfg.interpolation, cfg.augment)
