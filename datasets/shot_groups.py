"""Groups of classes by their number of training images: many-shot, medium-shot and few-shot."""

from collections.abc import Sequence

import torch


def shot_groups(counts: Sequence[int], many_above: int, few_below: int) -> dict[str, torch.Tensor]:
    """Group the classes by their number n of training images, as in OLTR (Liu et al. 2019).

    Args:
        counts: training images per class, [C].
        many_above: classes with n > many_above are many-shot.
        few_below: of the remaining classes, those with n < few_below are few-shot, and all others are medium-shot.

    Returns:
        `many`, `med`, `few` → indices of the classes in the group, int64 [number of classes in the group].
    """
    n = torch.tensor(counts, dtype=torch.int64)  # [C]
    many, few = n > many_above, n < few_below
    masks = {"many": many, "med": ~(many | few), "few": few & ~many}
    return {name: mask.nonzero().flatten() for name, mask in masks.items()}
