"""The entries of DATASETS: from a config to named sources. Part of the builder; what is below sees no config."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from yacs.config import CfgNode

from tailtune.configs import FOLDER
from tailtune.configs.errors import UserError, naming
from tailtune.datasets.data_bundle import Triple
from tailtune.datasets.long_tail import check_hold_out
from tailtune.datasets.sources import cifar, digits, fake, image_list
from tailtune.datasets.sources.available_images import AvailableImages, Outline
from tailtune.datasets.sources.image_folder import class_folders, read_folder
from tailtune.datasets.sources.image_list import CATEGORIES, Listing

HALF: Triple = (0.5, 0.5, 0.5)
log = logging.getLogger("tailtune")


@dataclass(frozen=True)
class Entry:
    outline: Callable[[CfgNode], Outline]
    """Needs no images and no network."""
    load: Callable[[CfgNode], AvailableImages]
    built_in: bool = False
    """The images come with a library and cannot change."""


def _cifar_outline(cfg: CfgNode) -> Outline:
    names = cifar.CLASS_NAMES[cfg.dataset]
    _check_built_in(cfg, len(names))
    return Outline(names, [cifar.TRAIN_IMAGES // len(names)] * len(names), cifar.MEAN, cifar.STD)


def _load_cifar(cfg: CfgNode) -> AvailableImages:
    outline = _cifar_outline(cfg)
    return AvailableImages(outline, *cifar.load_cifar(cfg.dataset, _folder(cfg, cfg.root)))


def _load_digits(cfg: CfgNode) -> AvailableImages:
    _check_built_in(cfg, len(digits.CLASS_NAMES))
    train, test = digits.digit_sources()
    return AvailableImages(Outline(digits.CLASS_NAMES, _count(train.labels), HALF, HALF), train, test)


def _fake_outline(cfg: CfgNode) -> Outline:
    num_classes = fake.check_classes(cfg.num_classes or 10)
    _check_built_in(cfg, num_classes)
    return Outline(_placeholders(num_classes), [fake.TRAIN_PER_CLASS] * num_classes, HALF, HALF)


def _load_fake(cfg: CfgNode) -> AvailableImages:
    outline = _fake_outline(cfg)
    return AvailableImages(outline, *fake.fake_sources(len(outline.class_names)))


def _list_outline(cfg: CfgNode) -> Outline:
    return _counts_outline(cfg) if cfg.class_counts else _read_lists(cfg)[0]


def _load_list(cfg: CfgNode) -> AvailableImages:
    return _locate(cfg, _read_lists(cfg))


def _folder_outline(cfg: CfgNode) -> Outline:
    return _read_folders(cfg)[0]


def _load_folder(cfg: CfgNode) -> AvailableImages:
    return _locate(cfg, _read_folders(cfg))


DATASETS: Mapping[str, Entry] = MappingProxyType(
    {
        "CIFAR10": Entry(_cifar_outline, _load_cifar, built_in=True),
        "CIFAR100": Entry(_cifar_outline, _load_cifar, built_in=True),
        "Digits": Entry(lambda cfg: _load_digits(cfg).outline, _load_digits, built_in=True),
        "Fake": Entry(_fake_outline, _load_fake, built_in=True),
        "ImageList": Entry(_list_outline, _load_list),
        "ImageFolder": Entry(_folder_outline, _load_folder),
    }
)

Listings = tuple[Outline, Listing, Listing | None, Listing | None]
"""Outline, then training, test and validation images."""


def _read_lists(cfg: CfgNode) -> Listings:
    if not cfg.train_list:
        raise UserError("dataset ImageList: set `train_list` to the list file of the training images")
    folders = list_folders(cfg)
    train = image_list.load_list("train_list", cfg.train_list, folders)
    test, val = (
        image_list.load_list(key, cfg[key], folders) if cfg[key] else None for key in ("test_list", "val_list")
    )
    taxa = None
    if cfg.label_field:
        new_label, taxa = image_list.taxon_labels(image_list.find_list(CATEGORIES, folders), cfg.label_field)
        train, test, val = train.relabel(new_label), test and test.relabel(new_label), val and val.relabel(new_label)
    listings = [each for each in (train, test, val) if each]
    num_classes = image_list.number_of_classes(train, listings, cfg.num_classes)
    names = _class_names(cfg, taxa or image_list.folder_names(train, num_classes), num_classes)
    for each in listings:
        each.check_labels(len(names))
    _check_names(cfg, names, num_classes)
    return _finish(cfg, names, train, test, val)


def _read_folders(cfg: CfgNode) -> Listings:
    _refuse(cfg, "train_list", "test_list", "val_list", "label_field", "class_counts")
    root = _folder(cfg, cfg.root)
    classes = class_folders(root / "train")
    train = read_folder(root, "train", classes)
    test, val = (read_folder(root, split, classes) if (root / split).is_dir() else None for split in ("test", "val"))
    names = _class_names(cfg, tuple(classes), len(classes))
    _check_names(cfg, names, len(classes))
    return _finish(cfg, names, train, test, val)


def _class_names(cfg: CfgNode, found: tuple[str, ...] | None, num_classes: int) -> tuple[str, ...]:
    """Names by the key `classnames`; `found` are those that the data themselves give, if they do."""
    if cfg.classnames == "imagenet":
        return image_list.imagenet_names()
    if cfg.classnames not in (None, "folders", CATEGORIES):
        with naming("classnames"):
            return image_list.read_names(image_list.find_list(cfg.classnames, list_folders(cfg)))
    if cfg.classnames == CATEGORIES and not cfg.label_field:
        raise UserError(f"classnames {CATEGORIES} needs `label_field`, e.g. name")
    if cfg.classnames == "folders" and found is None:
        raise UserError("classnames folders: the training list does not keep each class in a folder of its own")
    return found or _placeholders(num_classes)


def _check_names(cfg: CfgNode, names: tuple[str, ...], num_classes: int) -> None:
    if cfg.classnames and cfg.num_classes is None and len(names) != num_classes:
        raise UserError(f"classnames {cfg.classnames}: {len(names)} names for {num_classes} classes; one line a class")


def _finish(
    cfg: CfgNode, names: tuple[str, ...], train: Listing, test: Listing | None, val: Listing | None
) -> Listings:
    """Check the number of classes and the splits."""
    _check_num_classes(cfg, len(names))
    _check_test(cfg, has_test=test is not None)
    if val and cfg.val_per_class:
        raise UserError(f"val_per_class {cfg.val_per_class}: the data have a validation split already")
    counts = _count(train.labels, len(names))
    if test is None:
        check_hold_out(counts, cfg.test_per_class, names, "test_per_class")
        counts = [count - cfg.test_per_class for count in counts]
    return _outline(cfg, names, counts), train, test, val


def _locate(cfg: CfgNode, listings: Listings) -> AvailableImages:
    """The listings with their images, after a look whether those are there."""
    outline, train, test, val = listings
    if cfg.class_counts and _counts_outline(cfg).available != outline.available:
        log.warning("the training list has other class counts than %s; the list's are used", cfg.class_counts)
    root = _folder(cfg, cfg.root)
    return AvailableImages(outline, train.source(root), *(each.source(root) if each else None for each in (test, val)))


def _counts_outline(cfg: CfgNode) -> Outline:
    """From the JSON of class counts, without the lists; most class names stand in those and are placeholders here."""
    folders = [Path(cfg.data_dir), FOLDER / "data"] if cfg.data_dir else [FOLDER / "data"]
    file = image_list.first_file(cfg.class_counts, folders)
    if file is None:
        raise UserError(f"class_counts: no file '{cfg.class_counts}' in {folders[0]}")
    counts = image_list.read_counts(file, cfg.label_field)
    _check_num_classes(cfg, len(counts))
    _check_test(cfg, has_test=bool(cfg.test_list))
    names = image_list.imagenet_names() if cfg.classnames == "imagenet" else _placeholders(len(counts))
    check_hold_out(counts, cfg.test_per_class, names, "test_per_class")
    return _outline(cfg, names, [count - cfg.test_per_class for count in counts])


def _outline(cfg: CfgNode, names: tuple[str, ...], available: list[int]) -> Outline:
    """With the statistics of iNaturalist or, for any other photographs, of ImageNet."""
    if cfg.label_field:
        return Outline(names, available, image_list.INAT_MEAN, image_list.INAT_STD)
    return Outline(names, available, image_list.IMAGENET_MEAN, image_list.IMAGENET_STD)


def _folder(cfg: CfgNode, name: str) -> Path:
    """A folder option: relative to the user's YAML, else to the working directory."""
    path = Path(name).expanduser()
    beside = Path(cfg.data_dir) / path
    return beside if beside.exists() or not path.exists() else path


def list_folders(cfg: CfgNode) -> list[Path]:
    """Where list files are looked for: beside the user's YAML, then in `lists` or `root`."""
    last = _folder(cfg, cfg.lists or cfg.root)
    return [Path(cfg.data_dir), last] if cfg.data_dir else [last]


def _check_built_in(cfg: CfgNode, num_classes: int) -> None:
    """A data set with fixed splits and names takes no option that would change them."""
    _check_num_classes(cfg, num_classes)
    _refuse(cfg, "train_list", "test_list", "val_list", "label_field", "class_counts", "classnames", "test_per_class")


def _check_num_classes(cfg: CfgNode, num_classes: int) -> None:
    if cfg.num_classes not in (None, num_classes):
        raise UserError(f"num_classes {cfg.num_classes}: data '{cfg.data}' have {num_classes} classes")


def _check_test(cfg: CfgNode, has_test: bool) -> None:
    if has_test and cfg.test_per_class:
        raise UserError(f"test_per_class {cfg.test_per_class}: the data have a test split already")
    if not has_test and not cfg.test_per_class:
        where = "set `test_list`" if cfg.dataset == "ImageList" else f"add {_folder(cfg, cfg.root)}/test/<class>/…"
        raise UserError(f"no test split: {where}, or set `test_per_class` to hold training images out")


def _refuse(cfg: CfgNode, *keys: str) -> None:
    for key in keys:
        if cfg[key]:
            raise UserError(f"`{key}` does not apply to dataset {cfg.dataset}")


def _count(labels: np.ndarray, num_classes: int = 0) -> list[int]:
    return np.bincount(labels, minlength=num_classes).tolist()


def _placeholders(num_classes: int) -> tuple[str, ...]:
    return tuple(f"class {k}" for k in range(num_classes))
