"""Groups of classes by their number of training images: many-shot, medium-shot and few-shot."""

from collections.abc import Sequence

import torch

from tailtune.datasets.long_tail import shot_masks


def shot_groups(counts: Sequence[int], many_above: int, few_below: int) -> dict[str, torch.Tensor]:
    """Group the classes by their number n of training images, as in OLTR (Liu et al. 2019).

    Args:
        counts: training images per class, [C].
        many_above: classes with n > many_above are many-shot.
        few_below: of the remaining classes, those with n < few_below are few-shot, and all others are medium-shot.

    Returns:
        `many`, `med`, `few` → indices of the classes in the group, int64 [number of classes in the group].
    """
    masks = shot_masks(counts, many_above, few_below)
    return {name: torch.from_numpy(mask.nonzero()[0]) for name, mask in masks.items()}
