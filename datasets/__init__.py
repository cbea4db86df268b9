"""Data sets: `build_info` for facts without images, `build_data` for images."""

from dataclasses import replace

import numpy as np
import torch
from yacs.config import CfgNode

from configs.errors import UserError, lookup
from datasets.bundle import DataBundle, DataInfo, View
from datasets.descriptors import class_descriptors
from datasets.entries import DATASETS, Outline, list_folders
from datasets.imbalance import capped_counts, check_hold_out, hold_out, shot_groups, subsample
from datasets.shifts import build_shifts, shift_names
from datasets.transforms import (
    Transform,
    crop_resize,
    eval_transform,
    plain_transform,
    repeated,
    train_transform,
)

__all__ = ["DATASETS", "DataBundle", "DataInfo", "Dataset", "IterableDataset", "View", "build_data", "build_info"]


class IterableDataset:
    """Never instantiated. This package has the name of Hugging Face's: Accelerate on two or more processes runs
    `from datasets import IterableDataset` and asks `isinstance`, to which the answer is no."""


class Dataset:
    """Never instantiated. As `IterableDataset`, for Accelerate's `split_between_processes`."""


def build_info(cfg: CfgNode) -> DataInfo:
    """Facts about the training data, from config and formulas where those say it all.

    Reads neither images nor network; lists and folders only of data that declare no `class_counts`. With
    `class_counts` the names may be placeholders, as they stand in the lists.

    Raises:
        UserError: unknown data set or augmentation, missing list, or options that do not fit the data.
    """
    train_transform(cfg.augment, cfg.resolution, cfg.interpolation)  # so that a dry run refuses unknown names
    train_transform(cfg.adapt_views, cfg.resolution, cfg.interpolation, "adapt_views (an augmentation)")
    return _info(cfg, lookup(DATASETS, cfg.dataset, "dataset").outline(cfg))


def build_data(cfg: CfgNode) -> DataBundle:
    """All views of a run. CIFAR is downloaded where it is missing, so let one process of a machine go first.

    Raises:
        UserError: as `build_info`; also missing images.
    """
    augmented = train_transform(cfg.augment, cfg.resolution, cfg.interpolation)
    splits = lookup(DATASETS, cfg.dataset, "dataset").load(cfg)
    info = _info(cfg, splits.outline)
    if cfg.prompt == "descriptor" and cfg.descriptors:
        info = replace(info, descriptors=class_descriptors(cfg.descriptors, list_folders(cfg), info.class_names))
    labels = splits.train.labels
    kept, held = np.arange(len(labels)), None
    if cfg.imb_factor is not None:
        kept = subsample(labels, capped_counts(splits.outline.available, cfg.imb_factor))
    if cfg.val_per_class:
        held, rest = hold_out(labels[kept], cfg.val_per_class, info.class_names, "val_per_class")
        kept, held = kept[rest], kept[held]

    testing, views = _testing(cfg), train_transform(cfg.adapt_views, cfg.resolution, cfg.interpolation)
    train = View(splits.train, kept, augmented, cfg.seed, skip_bad=cfg.on_bad_image == "skip")
    val = None
    if held is not None:
        val = View(splits.train, held, testing, cfg.seed, train.skip_bad)
    elif splits.val is not None:
        val = View(splits.val, np.arange(len(splits.val)), testing, cfg.seed, train.skip_bad)
    test = View(splits.test, np.arange(len(splits.test)), testing, cfg.seed, train.skip_bad)
    test = test.limited(cfg.max_test_images)
    return DataBundle(
        info=info,
        train=train,
        plain=train.with_transform(plain_transform(cfg.resolution, cfg.interpolation)),
        train_as_test=train.with_transform(testing).limited(cfg.max_test_images),
        test=test,
        test_views=View(test.source, test.indices, repeated(views, 2), cfg.adapt_seed, test.skip_bad),
        val=val and val.limited(cfg.max_test_images),
        shifts=build_shifts(cfg, info, test.labels),  # here, so that a wrong list is refused before training
    )


def _info(cfg: CfgNode, outline: Outline) -> DataInfo:
    shift_names(cfg)
    if len(outline.class_names) < 2:
        raise UserError(
            f"the data of '{cfg.data}' have one class only ({', '.join(outline.class_names)}), so there is nothing to "
            "tell apart; give at least two classes"
        )
    counts = capped_counts(outline.available, cfg.imb_factor)
    if cfg.val_per_class:
        check_hold_out(counts, cfg.val_per_class, outline.class_names, "val_per_class")
        counts = [count - cfg.val_per_class for count in counts]
    if min(counts) == 0:
        # Priors, margins and class means are undefined for such a class; a silent -inf or nan helps nobody.
        empty = outline.class_names[counts.index(0)]
        raise UserError(
            f"class '{empty}' (label {counts.index(0)}) has no training image: add one, or raise imb_factor"
        )
    grouped = counts
    if cfg.group_imb_factor is not None:
        grouped = capped_counts(outline.available, cfg.group_imb_factor, "group_imb_factor")
    return DataInfo(
        name=cfg.data,
        class_names=outline.class_names,
        class_counts=torch.tensor(counts, dtype=torch.int64),
        groups=shot_groups(grouped, cfg.many_above, cfg.few_below),
        mean=outline.mean,
        std=outline.std,
    )


def _testing(cfg: CfgNode) -> Transform:
    """What one image of the test gives; the views of `tte` are cut from it by trainers/test_time.py."""
    if cfg.tte and cfg.tte_mode == "randaug":
        return repeated(train_transform(cfg.augment, cfg.resolution, cfg.interpolation), cfg.randaug_times)
    if cfg.tte:
        return crop_resize(cfg.resolution, cfg.expand, cfg.interpolation)
    return eval_transform(cfg.resolution, cfg.interpolation, cfg.augment)
