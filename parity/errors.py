"""How far our numbers are from the original's: relative errors of tensors and of single numbers."""

import math

import torch
from torch import Tensor

from tailtune.parity.job import Tensors


def error(ours: Tensor, original: Tensor, floor: float = 0.0) -> float:
    """Relative distance of two tensors, |ours − original| / |original| in the L2 norm.

    Args:
        ours: a tensor of any shape.
        original: what it should be.
        floor: the smallest number to divide by, where the norm of `original` is below it.

    Returns:
        The error; infinite if the shapes differ, or if `original` is zero and ours is not.
    """
    if ours.shape != original.shape:
        return math.inf
    ours, original = ours.detach().double(), original.detach().double()
    distance, norm = float((ours - original).norm()), max(floor, float(original.norm()))
    return distance / norm if norm else math.inf if distance else 0.0


def largest_error(ours: Tensors, original: Tensors, floor: float = 0.0) -> float:
    """The largest error among tensors of the same names.

    Args:
        ours: our tensors; a missing one counts as an infinite error.
        original: the original's tensors.
        floor: as in `error`, as a share of the largest norm among the original's tensors.
    """
    norm = max(float(tensor.double().norm()) for tensor in original.values())
    return max(
        error(ours[name], tensor, floor * norm) if name in ours else math.inf for name, tensor in original.items()
    )


def error_of_all(ours: Tensors, original: Tensors) -> float:
    """The error of all tensors as one vector; infinite if one is missing or has another shape."""
    if any(name not in ours or ours[name].shape != tensor.shape for name, tensor in original.items()):
        return math.inf
    mine, theirs = (
        torch.cat([side[name].detach().double().flatten() for name in original]) for side in (ours, original)
    )
    return error(mine, theirs)


def number_error(ours: float, original: float) -> float:
    """Relative distance of two numbers; infinite if the original's is zero and ours is not."""
    return abs(ours - original) / abs(original) if original else math.inf if ours else 0.0


def with_prefix(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
