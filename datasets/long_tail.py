"""Long-tailed subsets and held-out images, as pure functions of labels and counts.

The subsets are the published CIFAR-LT ones (Cui et al. 2019, LDAM, SADE, LIFT). They are made by NumPy's legacy shuffle
with seed 0, and do not depend on the seed of the run. Therefore, runs with different seeds train on the same images.
"""

from collections.abc import Sequence

import numpy as np

from tailtune.configs.errors import UserError

SUBSET_SEED = 0
"""Seed of the published subsets."""
SHOT_GROUPS = {"many_acc": "many", "med_acc": "med", "few_acc": "few"}
"""Metric name → shot group; the metric is that group's mean class accuracy. `shot_groups.py` makes the groups."""


def longtail_counts(n_max: float, num_classes: int, imb_factor: float) -> list[int]:
    """Images per class of an exponentially decaying class distribution (Cui et al. 2019).

    n_k = int(n_max · imb_factor^(k/(C−1))) for k = 0 … C−1.

    Args:
        n_max: images of the first class.
        num_classes: number of classes C.
        imb_factor: images of the last class / images of the first class.

    Returns:
        C numbers, rounded down.
    """
    last = max(num_classes - 1, 1)
    return [int(n_max * imb_factor ** (k / last)) for k in range(num_classes)]


def capped_counts(available: Sequence[int], imb_factor: float | None, key: str = "imb_factor") -> list[int]:
    """Training images per class after the data have been made long-tailed.

    The first class keeps as many images as the largest class has. No class gets more images than it has.

    Args:
        available: images of each class, [C].
        imb_factor: images of the smallest class / images of the largest class; None leaves the counts unchanged.
        key: the option that sets `imb_factor`, for messages.

    Returns:
        Images per class, [C].

    Raises:
        UserError: `imb_factor` is not above 0 and at most 1.
    """
    if imb_factor is None:
        return list(available)
    if not 0 < imb_factor <= 1:
        raise UserError(f"{key} {imb_factor:g}: give smallest class / largest class, above 0 and at most 1")
    wanted = longtail_counts(max(available), len(available), imb_factor)
    return [min(have, want) for have, want in zip(available, wanted, strict=True)]


def subsample(labels: np.ndarray, counts: Sequence[int], seed: int = SUBSET_SEED) -> np.ndarray:
    """Choose a subset with given class counts; with the default seed it is the published CIFAR-LT subset.

    The positions of each class are shuffled, one class after another, and the first n_k are kept. If all classes have
    the same size, a subset with smaller counts is contained in one with larger counts.

    Args:
        labels: label of each image, int64 [N].
        counts: images to keep of each class, [C].
        seed: seed of the shuffles.

    Returns:
        Positions in `labels`, sorted by class and shuffled within a class, int64 [Σ counts].
    """
    orders = _shuffled(labels, len(counts), seed)
    return np.concatenate([order[:keep] for order, keep in zip(orders, counts, strict=True)])


def capped(counts: Sequence[int], cap: int | None) -> list[int]:
    """Images per class [C] of a subset with at most `cap` images of each class; None: all."""
    return list(counts) if cap is None else [min(count, cap) for count in counts]


def capped_subset(labels: np.ndarray, cap: int, seed: int) -> np.ndarray:
    """Choose at most `cap` random images of each class, without replacement, as LT-Soups does.

    One `default_rng` draws for all classes, in the order of the labels.

    Args:
        labels: label of each image, int64 [N].
        cap: largest number of images of a class.
        seed: seed of the draws.

    Returns:
        Ascending positions in `labels`, int64.
    """
    random = np.random.default_rng(seed)
    by_class = (np.flatnonzero(labels == label) for label in np.unique(labels))
    return np.sort(np.concatenate([random.choice(each, min(cap, len(each)), replace=False) for each in by_class]))


def hold_out(labels: np.ndarray, per_class: int, class_names: Sequence[str], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Hold out the same number of random images of every class.

    Args:
        labels: label of each image, int64 [N].
        per_class: images to hold out of each class.
        class_names: C names, for messages.
        key: the option that sets `per_class`, for messages.

    Returns:
        The positions of the held-out images, sorted by class, int64 [C · per_class]; and the positions of all other
        images, ascending, int64 [N − C · per_class].

    Raises:
        UserError: a class would keep no image.
    """
    check_hold_out(np.bincount(labels, minlength=len(class_names)), per_class, class_names, key)
    held = np.concatenate([order[:per_class] for order in _shuffled(labels, len(class_names))])
    return held, np.setdiff1d(np.arange(len(labels)), held)


def check_hold_out(counts: Sequence[int] | np.ndarray, per_class: int, class_names: Sequence[str], key: str) -> None:
    """Check that every class keeps an image after `per_class` images have been held out.

    Args:
        counts: images per class, [C].
        per_class: images to hold out of each class.
        class_names: C names, for messages.
        key: the option that sets `per_class`, for messages.

    Raises:
        UserError: a class has no more than `per_class` images.
    """
    for name, count in zip(class_names, counts, strict=True):
        if count <= per_class:
            raise UserError(
                f"{key} {per_class}: class '{name}' has only {count} images and must keep at least one; lower {key}"
            )


def check_classes(counts: Sequence[int] | np.ndarray, class_names: Sequence[str], data: str) -> None:
    """Check that there are several classes, and that each has a training image.

    Priors, margins and class means are undefined for a class without one: they would become inf or nan.

    Args:
        counts: training images per class, [C].
        class_names: C names, for messages.
        data: name of the data config, for messages.

    Raises:
        UserError: there is only one class, or a class has no training image.
    """
    if len(class_names) < 2:
        raise UserError(f"the data of '{data}' have only one class ({class_names[0]}); give at least two classes")
    if not np.all(counts):
        label = list(counts).index(0)
        raise UserError(
            f"class '{class_names[label]}' (label {label}) has no training image: add one, or raise imb_factor"
        )


def shot_masks(counts: Sequence[int] | np.ndarray, many_above: int, few_below: int) -> dict[str, np.ndarray]:
    """Group the classes by their number n of training images, as in OLTR (Liu et al. 2019).

    Args:
        counts: training images per class, [C].
        many_above: classes with n > many_above are many-shot.
        few_below: of the remaining classes, those with n < few_below are few-shot, and all others are medium-shot.

    Returns:
        `many`, `med`, `few` → whether each class is in the group, bool [C].
    """
    n = np.asarray(counts)
    many, few = n > many_above, n < few_below
    return {"many": many, "med": ~(many | few), "few": few & ~many}


def random_positions(length: int, limit: int | None) -> np.ndarray:
    """Choose random positions in a split. The same arguments always give the same positions.

    Args:
        length: number of images of the split.
        limit: number of positions to choose; None for all.

    Returns:
        Ascending positions, int64 [min(length, limit)].
    """
    if limit is None or limit >= length:
        return np.arange(length)
    return np.sort(np.random.RandomState(SUBSET_SEED).permutation(length)[:limit])


def _shuffled(labels: np.ndarray, num_classes: int, seed: int = SUBSET_SEED) -> list[np.ndarray]:
    """The positions of each class in random order. Only NumPy's legacy random generator gives the published order."""
    random = np.random.RandomState(seed % 2**32)
    ends = np.bincount(labels, minlength=num_classes).cumsum()
    by_class = np.split(labels.argsort(kind="stable"), ends[:-1])
    for positions in by_class:
        random.shuffle(positions)
    return by_class
