"""`build_info` gives facts about the data without reading images; `build_data` gives the images of a run.

These functions take the config. Other modules of datasets/ get small groups of options instead (options.py).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from yacs.config import CfgNode

from tailtune.configs.errors import lookup
from tailtune.datasets.data_bundle import DataBundle, DataInfo
from tailtune.datasets.data_settings import DataFolders, DataSettings, SplitSettings
from tailtune.datasets.images.tensor_transforms import TensorTransform
from tailtune.datasets.images.transforms import Transform, check_augment
from tailtune.datasets.long_tail import capped, capped_counts, check_classes, check_hold_out
from tailtune.datasets.run_transforms import RunTransforms, check_cache
from tailtune.datasets.shot_groups import shot_groups
from tailtune.datasets.sources.available_images import Outline
from tailtune.datasets.sources.class_descriptors import class_descriptors
from tailtune.datasets.splits.choose_splits import choose_splits, make_records
from tailtune.datasets.splits.split_records import Split, StoredSplits
from tailtune.datasets.splits.unreadable_images import check_readable
from tailtune.datasets.table import DATASETS, pixel_stats
from tailtune.datasets.test_distributions.build import build_distributions
from tailtune.datasets.test_distributions.frequency_rules import distribution_names
from tailtune.datasets.test_distributions.settings import DistributionSettings
from tailtune.datasets.view import View


def build_info(cfg: CfgNode, counts: Sequence[int] | None = None) -> DataInfo:
    """Facts about the training data.

    No image is read and nothing is downloaded. Lists and folders are read only if the data have no `class_counts`; with
    `class_counts` the class names may be placeholders.

    Args:
        cfg: the config of a stage.
        counts: training images per class [C] that a run has stored; None: computed from the options.

    Raises:
        UserError: an unknown data set or augmentation, a missing list, or options that do not fit the data.
    """
    for key in ("augment", "adapt_views"):  # only to refuse unknown names, which a dry run reports, too
        check_augment(cfg[key], cfg.interpolation, key)
    check_cache(cfg.cache, cfg.image_backend, cfg.augment)
    return _info(cfg, lookup(DATASETS, cfg.dataset, "dataset").outline(DataSettings.of(cfg)), counts)


def build_data(cfg: CfgNode, stored: StoredSplits | None = None, counts: Sequence[int] | None = None) -> DataBundle:
    """The data of a run. CIFAR is downloaded if it is missing, so let one process of each machine call this first.

    Args:
        cfg: the config of a stage.
        stored: the splits of the run that is continued or evaluated; its held-out images are used again.
        counts: training images per class [C] that a run has stored; None: those of the images at hand.

    Raises:
        UserError: as `build_info`; or images are missing.
        UnreadableImages: some files are not images, and the option `on_bad_image` is not `skip`.
    """
    transforms = RunTransforms.of(cfg)
    options, skip = SplitSettings.of(cfg), cfg.on_bad_image == "skip"
    available = lookup(DATASETS, cfg.dataset, "dataset").load(DataSettings.of(cfg))
    names = available.outline.class_names
    chosen = check_readable(choose_splits(options, available, stored), stored, names, skip)
    train, test, val = chosen.by_name["train"], chosen.by_name["test"], chosen.by_name.get("val")
    if counts is None:
        counts = np.bincount(train.source.labels[train.indices], minlength=len(names)).tolist()
    info = with_descriptors(cfg, _info(cfg, available.outline, counts))

    def view(split: Split, transform: Transform | TensorTransform) -> View:
        return View(split.source, split.indices, transform, cfg.seed, skip)

    for_test = transforms.test
    quick = cfg.max_test_images if cfg.keep == "last" else None  # all validation images choose the best epoch
    tested = view(test, for_test).limited(cfg.max_test_images)
    return DataBundle(
        info=info,
        train=view(train, transforms.train),
        train_unaugmented=view(train, transforms.unaugmented),
        train_as_test=view(train, for_test).limited(cfg.max_test_images),
        test=tested,
        test_views=View(tested.source, tested.indices, transforms.adapt, cfg.adapt_seed, skip),
        val=None if val is None else view(val, for_test).limited(cfg.max_test_images),
        val_in_training=None if val is None else view(val, transforms.validation).limited(quick),
        # Built before training, so that a wrong list file is refused before it.
        test_distributions=build_distributions(
            DistributionSettings.of(cfg), info, tested.labels, lambda: tested.indices
        ),
        records=make_records(options, chosen, stored),
        splits=chosen,
    )


def stored_info(cfg: CfgNode, class_names: Sequence[str], counts: Sequence[int]) -> DataInfo:
    """Facts about the data of a finished run, as its checkpoint records them. The data need not be there any more.

    Args:
        cfg: the config of the run.
        class_names: its C class names, in label order.
        counts: its training images per class [C].

    Returns:
        The facts, without the shot groups, which only an evaluation reads.
    """
    mean, std = pixel_stats(DataSettings.of(cfg))
    return DataInfo(cfg.data, tuple(class_names), torch.tensor(list(counts), dtype=torch.int64), {}, mean, std)


def with_descriptors(cfg: CfgNode, info: DataInfo) -> DataInfo:
    """Add the texts of each class if the config asks for `prompt descriptor`.

    Raises:
        UserError: the file that `descriptors` names is missing or wrong.
    """
    if cfg.prompt != "descriptor" or not cfg.descriptors:
        return info
    texts = class_descriptors(cfg.descriptors, DataFolders.of(cfg).for_lists(), info.class_names)
    return replace(info, descriptors=texts)


def _info(cfg: CfgNode, outline: Outline, counts: Sequence[int] | None) -> DataInfo:
    distribution_names(DistributionSettings.of(cfg))  # only to refuse wrong ones
    whole = _counts_of_training(cfg, outline) if counts is None or cfg.subset_cap is not None else list(counts)
    if counts is None:
        counts = capped(whole, cfg.subset_cap)
    check_classes(counts, outline.class_names, cfg.data)
    counts_of_groups = whole
    if cfg.group_imb_factor is not None:
        counts_of_groups = capped_counts(outline.available, cfg.group_imb_factor, "group_imb_factor")
    return DataInfo(
        name=cfg.data,
        class_names=outline.class_names,
        class_counts=torch.tensor(list(counts), dtype=torch.int64),
        groups=shot_groups(counts_of_groups, cfg.many_above, cfg.few_below),
        mean=outline.mean,
        std=outline.std,
        counts_before_cap=None if cfg.subset_cap is None else torch.tensor(list(whole), dtype=torch.int64),
    )


def _counts_of_training(cfg: CfgNode, outline: Outline) -> list[int]:
    """Training images per class [C] before `subset_cap` cuts them."""
    counts = capped_counts(outline.available, cfg.imb_factor)
    if not cfg.val_per_class:
        return counts
    check_hold_out(counts, cfg.val_per_class, outline.class_names, "val_per_class")
    return [count - cfg.val_per_class for count in counts]
