"""DATASETS: the table of data sets. An entry gives the facts about a data set, and loads its images."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from tailtune.configs.config_files import FOLDER
from tailtune.configs.errors import UserError, lookup, prefix_errors
from tailtune.datasets.data_settings import DataSettings
from tailtune.datasets.long_tail import check_hold_out
from tailtune.datasets.option_checks import check_built_in, check_names, check_num_classes, check_test, refuse
from tailtune.datasets.sources import cifar, digits, fake, image_list, inaturalist
from tailtune.datasets.sources.available_images import RGB, AvailableImages, Outline
from tailtune.datasets.sources.image_folder import SPLITS, class_folders, read_folder
from tailtune.datasets.sources.inaturalist import CATEGORIES
from tailtune.datasets.sources.listing import Listing
from tailtune.datasets.sources.shards import ShardSource, open_shards

HALF: RGB = (0.5, 0.5, 0.5)
Labelled = Listing | ShardSource
log = logging.getLogger("tailtune")


@dataclass(frozen=True)
class DatasetEntry:
    """How a data set is loaded."""

    outline: Callable[[DataSettings], Outline]
    """Gives the facts about the data; needs neither images nor network."""
    load: Callable[[DataSettings], AvailableImages]
    """Finds the images, and downloads them if this is possible."""
    built_in: bool = False
    """The images come from a library and cannot change."""
    listings: Callable[[DataSettings], "SplitListings"] | None = None
    """Gives the paths and labels of the images, which are not looked for; None for built-in data."""


class SplitListings(NamedTuple):
    """What list files or class folders say about a data set."""

    outline: Outline
    train: Listing
    test: Listing | None
    val: Listing | None


def _cifar_outline(options: DataSettings) -> Outline:
    names = cifar.CLASS_NAMES[options.dataset]
    check_built_in(options, len(names))
    return Outline(names, [cifar.TRAIN_IMAGES // len(names)] * len(names), cifar.MEAN, cifar.STD)


def _load_cifar(options: DataSettings) -> AvailableImages:
    outline = _cifar_outline(options)
    return AvailableImages(outline, *cifar.load_cifar(options.dataset, options.folders.image_root()))


def _load_digits(options: DataSettings) -> AvailableImages:
    check_built_in(options, len(digits.CLASS_NAMES))
    train, test = digits.digit_sources()
    return AvailableImages(Outline(digits.CLASS_NAMES, _counts_of(train.labels), HALF, HALF), train, test)


def _fake_outline(options: DataSettings) -> Outline:
    num_classes = options.num_classes or 10
    fake.check_num_classes(num_classes)
    check_built_in(options, num_classes)
    return Outline(_placeholders(num_classes), [fake.TRAIN_PER_CLASS] * num_classes, HALF, HALF)


def _load_fake(options: DataSettings) -> AvailableImages:
    outline = _fake_outline(options)
    return AvailableImages(outline, *fake.fake_sources(len(outline.class_names)))


def _list_outline(options: DataSettings) -> Outline:
    return _outline_from_counts(options) if options.class_counts else _read_lists(options).outline


def _load_list(options: DataSettings) -> AvailableImages:
    return _with_images(options, _read_lists(options))


def _folder_outline(options: DataSettings) -> Outline:
    return _read_folders(options).outline


def _load_folder(options: DataSettings) -> AvailableImages:
    return _with_images(options, _read_folders(options))


def read_list_files(
    options: DataSettings, splits: Collection[str] = SPLITS
) -> tuple[dict[str, Listing], tuple[str, ...] | None]:
    """Read the list files of some splits. Labels are those of the option `label_field`.

    Args:
        options: the names of the list files, and the folders that may hold them.
        splits: the splits to read; those without a list file are left out.

    Returns:
        Split → its images; and the class names that follow from `label_field`, if it is set.

    Raises:
        UserError: a list file is missing or wrong.
    """
    folders = options.folders.for_lists()
    listings = {
        split: image_list.load_list(f"{split}_list", file, folders)
        for split, file in options.list_files().items()
        if split in splits
    }
    if not options.label_field:
        return listings, None
    categories = image_list.find_list(CATEGORIES, folders)
    new_label, taxa = inaturalist.taxon_labels(categories, options.label_field)
    return {split: listing.relabel(new_label) for split, listing in listings.items()}, taxa


def _read_lists(options: DataSettings) -> SplitListings:
    if not options.train_list:
        raise UserError("dataset ImageList: set `train_list` to the list file of the training images")
    by_split, taxa = read_list_files(options)
    train, test, val = by_split["train"], by_split.get("test"), by_split.get("val")
    listings = [listing for listing in (train, test, val) if listing]
    num_classes = image_list.number_of_classes(train, listings, options.num_classes)
    names = _class_names(options, taxa or image_list.folder_names(train, num_classes), num_classes)
    for listing in listings:
        listing.check_labels(num_classes)
    check_names(options, names, num_classes)
    return _checked(options, names, train, test, val)


def _read_folders(options: DataSettings) -> SplitListings:
    refuse(options, "train_list", "test_list", "val_list", "label_field", "class_counts")
    root = options.folders.image_root()
    classes = class_folders(root / "train")
    train = read_folder(root, "train", classes)
    test, val = (read_folder(root, split, classes) if (root / split).is_dir() else None for split in ("test", "val"))
    names = _class_names(options, tuple(classes), len(classes))
    check_names(options, names, len(classes))
    return _checked(options, names, train, test, val)


def _load_shards(options: DataSettings) -> AvailableImages:
    refuse(options, "train_list", "val_list", "class_counts")
    shards = open_shards(options.folders.url or options.folders.image_root())
    names = _class_names(options, shards.class_names, len(shards.class_names))
    check_names(options, names, len(shards.class_names))
    train, test, val = (shards.by_split.get(split) for split in ("train", "test", "val"))
    assert train is not None
    return AvailableImages(_checked_outline(options, names, train, test, val), train, test, val)


DATASETS: Mapping[str, DatasetEntry] = MappingProxyType(
    {
        "CIFAR10": DatasetEntry(_cifar_outline, _load_cifar, built_in=True),
        "CIFAR100": DatasetEntry(_cifar_outline, _load_cifar, built_in=True),
        "Digits": DatasetEntry(lambda options: _load_digits(options).outline, _load_digits, built_in=True),
        "Fake": DatasetEntry(_fake_outline, _load_fake, built_in=True),
        "ImageList": DatasetEntry(_list_outline, _load_list, listings=_read_lists),
        "ImageFolder": DatasetEntry(_folder_outline, _load_folder, listings=_read_folders),
        "Shards": DatasetEntry(lambda options: _load_shards(options).outline, _load_shards),
    }
)
"""Entries of the option `dataset`."""


def _class_names(options: DataSettings, data_names: tuple[str, ...] | None, num_classes: int) -> tuple[str, ...]:
    """The class names that the option `classnames` asks for; `data_names` are those that the data contain, if any."""
    if options.classnames == "imagenet":
        return image_list.imagenet_names()
    if options.classnames not in (None, "folders", CATEGORIES):
        with prefix_errors("classnames"):
            names = image_list.read_names(image_list.find_list(options.classnames, options.folders.for_lists()))
        if all(name.startswith(f"{folder} ") for name, folder in zip_longest(names, data_names or ("",), fillvalue="")):
            log.warning(  # as LIFT's files, whose code takes the first word away
                "warning: classnames %s: each name begins with the folder of its class, as '%s' does, and prompts have "
                "it, too; take it away if it is not meant",
                options.classnames,
                names[0],
            )
        return names
    if options.classnames == CATEGORIES and not options.label_field:
        raise UserError(f"classnames {CATEGORIES} needs `label_field`, for example `label_field name`")
    if options.classnames == "folders" and data_names is None:
        raise UserError(
            "classnames folders: the images of train_list are not in one folder per class; give a file of names"
        )
    return data_names or _placeholders(num_classes)


def _checked(
    options: DataSettings, names: tuple[str, ...], train: Listing, test: Listing | None, val: Listing | None
) -> SplitListings:
    """The listings, after a check of the number of classes and of the splits."""
    return SplitListings(_checked_outline(options, names, train, test, val), train, test, val)


def _checked_outline(
    options: DataSettings, names: tuple[str, ...], train: Labelled, test: Labelled | None, val: Labelled | None
) -> Outline:
    """The facts about the data, after a check of the number of classes and of the splits."""
    check_num_classes(options, len(names))
    check_test(options, has_test=test is not None)
    if val and options.val_per_class:
        raise UserError(
            f"val_per_class {options.val_per_class}: the data have a validation split already; set val_per_class 0"
        )
    counts = _counts_of(train.labels, len(names))
    if test is None:
        check_hold_out(counts, options.test_per_class, names, "test_per_class")
        counts = [count - options.test_per_class for count in counts]
    return _outline(options, names, counts)


def _with_images(options: DataSettings, listings: SplitListings) -> AvailableImages:
    """The images that the listings name, after a check that their folder is right."""
    outline, train, test, val = listings
    if options.class_counts and _outline_from_counts(options).available != outline.available:
        log.warning(
            "warning: %s has other class counts than the training list; those of the list are used",
            options.class_counts,
        )
    root = options.folders.image_root()
    return AvailableImages(
        outline, train.source(root), test.source(root) if test else None, val.source(root) if val else None
    )


def _outline_from_counts(options: DataSettings) -> Outline:
    """The facts that the file of class counts gives without the lists. Most class names are placeholders then."""
    assert options.class_counts
    shipped = FOLDER / "data"
    folders = [Path(options.folders.data_dir), shipped] if options.folders.data_dir else [shipped]
    file = image_list.first_file(options.class_counts, folders)
    if file is None:
        raise UserError(f"class_counts: no file '{options.class_counts}' in {folders[0]}; give its path from there")
    counts = image_list.read_counts(file, options.label_field)
    check_num_classes(options, len(counts))
    check_test(options, has_test=bool(options.test_list))
    names = image_list.imagenet_names() if options.classnames == "imagenet" else _placeholders(len(counts))
    check_hold_out(counts, options.test_per_class, names, "test_per_class")
    return _outline(options, names, [count - options.test_per_class for count in counts])


def _outline(options: DataSettings, names: tuple[str, ...], available: list[int]) -> Outline:
    return Outline(names, available, *_photo_stats(options))


def pixel_stats(options: DataSettings) -> tuple[RGB, RGB]:
    """Mean and standard deviation of the pixels (0–1) of a data set. Neither lists nor folders are read."""
    entry = lookup(DATASETS, options.dataset, "dataset")
    if not entry.built_in:
        return _photo_stats(options)
    outline = entry.outline(options)
    return outline.mean, outline.std


def _photo_stats(options: DataSettings) -> tuple[RGB, RGB]:
    """The pixel statistics of iNaturalist, or of ImageNet for any other photographs."""
    if options.label_field:
        return inaturalist.MEAN, inaturalist.STD
    return image_list.IMAGENET_MEAN, image_list.IMAGENET_STD


def _counts_of(labels: np.ndarray, num_classes: int = 0) -> list[int]:
    return np.bincount(labels, minlength=num_classes).tolist()


def _placeholders(num_classes: int) -> tuple[str, ...]:
    return tuple(f"class {k}" for k in range(num_classes))
