"""Long-tailed subsets, hold-outs and shot groups, as pure functions of labels and counts.

The subsets are the published CIFAR-LT ones (Cui et al. 2019, LDAM, SADE, LIFT): they come from NumPy's legacy
shuffle with seed 0, here from a generator of its own. They depend on no seed of the run, so that runs with
different seeds train on the same images.
"""

from collections.abc import Sequence

import numpy as np
import torch

from tailtune.configs.errors import UserError

SUBSET_SEED = 0
GROUPS = {"many_acc": "many", "med_acc": "med", "few_acc": "few"}
"""Metric → the shot group whose mean class accuracy it is, a key of `shot_groups`."""


def longtail_counts(n_max: float, num_classes: int, imb_factor: float) -> list[int]:
    """n_k = int(n_max · imb_factor^(k/(C−1))): exponential decay over the classes, truncated."""
    last = max(num_classes - 1, 1)
    return [int(n_max * imb_factor ** (k / last)) for k in range(num_classes)]


def capped_counts(available: Sequence[int], imb_factor: float | None, key: str = "imb_factor") -> list[int]:
    """Training images per class: the long tail below the largest class, as far as each class has the images.

    Raises:
        UserError: `imb_factor`, which is the value of the option `key`, is not in (0, 1].
    """
    if imb_factor is None:
        return list(available)
    if not 0 < imb_factor <= 1:
        raise UserError(f"{key} {imb_factor:g}: it is smallest class / largest class, above 0 and at most 1")
    wanted = longtail_counts(max(available), len(available), imb_factor)
    return [min(have, want) for have, want in zip(available, wanted, strict=True)]


def subsample(labels: np.ndarray, counts: Sequence[int], seed: int = SUBSET_SEED) -> np.ndarray:
    """Positions of the published subset.

    Class by class, one stream of shuffles over the ascending positions; the first n_k stay, in shuffled order.
    With classes of equal size the subsets for different counts are therefore nested.

    Args:
        labels: [N].
        counts: images to keep, one number per class.
        seed: another one than the published.

    Returns:
        int64 [Σ counts], sorted by class.
    """
    orders = _shuffled(labels, len(counts), seed)
    return np.concatenate([order[:keep] for order, keep in zip(orders, counts, strict=True)])


def hold_out(labels: np.ndarray, per_class: int, class_names: Sequence[str], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Split off the same number of images of every class.

    Args:
        labels: [N].
        per_class: images to hold out of each class.
        class_names: [C], for messages.
        key: the option that asks for it, for messages.

    Returns:
        Positions held out, sorted by class, int64 [C · per_class]; positions that remain, ascending.

    Raises:
        UserError: a class would keep no image.
    """
    check_hold_out(np.bincount(labels, minlength=len(class_names)), per_class, class_names, key)
    held = np.concatenate([order[:per_class] for order in _shuffled(labels, len(class_names))])
    return held, np.setdiff1d(np.arange(len(labels)), held)


def check_hold_out(counts: Sequence[int] | np.ndarray, per_class: int, class_names: Sequence[str], key: str) -> None:
    """Raise a `UserError` that names the first class with no more than `per_class` images."""
    for name, count in zip(class_names, counts, strict=True):
        if count <= per_class:
            raise UserError(f"{key} {per_class}: class '{name}' has only {count} images, it must keep at least one")


def some_positions(length: int, limit: int | None) -> np.ndarray:
    """All positions, or `limit` of them drawn over the whole split, whose order may be by class; ascending."""
    if limit is None or limit >= length:
        return np.arange(length)
    return np.sort(np.random.RandomState(SUBSET_SEED).permutation(length)[:limit])


def shot_groups(counts: Sequence[int], many_above: int, few_below: int) -> dict[str, torch.Tensor]:
    """Class indices of the many-shot (n > many_above), few-shot (n < few_below) and medium-shot classes, int64."""
    n = torch.tensor(counts, dtype=torch.int64)  # [C]
    many, few = n > many_above, n < few_below
    masks = {"many": many, "med": ~(many | few), "few": few & ~many}
    return {name: mask.nonzero().flatten() for name, mask in masks.items()}


def _shuffled(labels: np.ndarray, num_classes: int, seed: int = SUBSET_SEED) -> list[np.ndarray]:
    """The positions of each class, shuffled by one legacy stream (the only one that gives the published order)."""
    stream = np.random.RandomState(seed % 2**32)
    ends = np.bincount(labels, minlength=num_classes).cumsum()
    by_class = np.split(labels.argsort(kind="stable"), ends[:-1])
    for positions in by_class:
        stream.shuffle(positions)
    return by_class
