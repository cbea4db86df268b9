"""Assigns images to training, validation and test split: stratified by class, seeded, and whole groups at a time.

The order in which images are taken is a digest of the seed and their path or group. So without groups the split of a
class depends on no other class, and new images of one class change no other class.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from tailtune.configs.seeding import derive_seed

MAX_PASSES = 10
"""Most passes over all groups. Without groups, the second pass changes nothing."""


def wanted_counts(counts: np.ndarray, amount: float) -> np.ndarray:
    """How many images of each class a held-out split should have.

    Args:
        counts: images of each class, int64 [C].
        amount: below 1: the share of each class, rounded, but at least one image; from 1: the number of images.

    Returns:
        int64 [C]. A class keeps at least one other image, so a class of one image gives none.
    """
    wanted = np.maximum(1, np.rint(amount * counts)) if amount < 1 else np.full(len(counts), amount)
    return np.minimum(wanted if amount > 0 else 0, np.maximum(counts - 1, 0)).astype(np.int64)


def assign_splits(
    labels: np.ndarray, groups: Sequence[str], held_out: Mapping[str, float], num_classes: int, seed: int
) -> np.ndarray:
    """Assign images to splits. All images of a group come into one split, and every class keeps a training image.

    Args:
        labels: class of each image, int64 [N].
        groups: group of each image, [N]; images without a group of their own have their path.
        held_out: name of a held-out split → its amount, as in `wanted_counts`.
        num_classes: number of classes C.
        seed: seed of the order.

    Returns:
        Name of the split of each image, [N]; `train` for those that no held-out split took.
    """
    members: dict[str, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    contents = {group: Counter(labels[positions].tolist()) for group, positions in members.items()}
    split_of = np.full(len(labels), "train", dtype=object)
    left = np.bincount(labels, minlength=num_classes)  # images that are still in the training split
    total = left.copy()
    for name, amount in held_out.items():
        needed = np.minimum(wanted_counts(total, amount), np.maximum(left - 1, 0))
        order = sorted(contents, key=lambda group: derive_seed(seed, "data new", name, group))
        for group in _taken(order, contents, needed, left):
            split_of[members[group]] = name
            del contents[group]
    return split_of


def _taken(
    order: Sequence[str], contents: Mapping[str, Counter[int]], needed: np.ndarray, left: np.ndarray
) -> list[str]:
    """The groups that a split takes. `left` is reduced by their images.

    A group is taken, or given back, if this brings the numbers of images closer to what is needed. Then the smallest
    group is taken for each class that has got no image, because its groups are larger than what is needed.
    """
    taken: set[str] = set()
    missing = needed.copy()

    def move(group: str, sign: int) -> None:
        for label, count in contents[group].items():
            missing[label] -= sign * count
            left[label] -= sign * count
        taken.symmetric_difference_update([group])

    def improves(group: str, sign: int) -> bool:
        """Whether the squares of `missing`, each divided by what is needed, become smaller in sum."""
        changes = (
            (count**2 - 2 * sign * count * int(missing[label])) / max(1, int(needed[label]))
            for label, count in contents[group].items()
        )
        return sum(changes) < 0

    for _ in range(MAX_PASSES):
        changed = False
        for group in order:
            sign = -1 if group in taken else 1
            if improves(group, sign) and (sign < 0 or _spares(contents[group], left)):
                move(group, sign)
                changed = True
        if not changed:
            break
    for label in np.flatnonzero(needed > 0).tolist():
        if missing[label] == needed[label]:
            fitting = [g for g in order if label in contents[g] and g not in taken and _spares(contents[g], left)]
            if fitting:
                move(min(fitting, key=lambda group: contents[group].total()), 1)
    return [group for group in order if group in taken]


def _spares(content: Mapping[int, int], left: np.ndarray) -> bool:
    """Whether every class keeps a training image if a group is taken."""
    return all(left[label] > count for label, count in content.items())
