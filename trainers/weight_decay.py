"""DECAY_RULES: which trainable parameters have weight decay."""

from collections.abc import Callable
from typing import Any

Groups = list[dict[str, Any]]
"""Parameter groups of torch: `name`, `params`, and settings for this group only, such as `weight_decay`."""


def decay_all(groups: Groups) -> Groups:
    """Weight decay on all trainable parameters, as in LIFT."""
    return groups


def decay_matrices(groups: Groups) -> Groups:
    """No weight decay on biases, the weights of norms and other parameters of less than two dimensions.

    Each group becomes two of the same name, so that `lr_factors` holds for both.
    """
    split: Groups = []
    for group in groups:
        matrices = [parameter for parameter in group["params"] if parameter.ndim > 1]
        rest = [parameter for parameter in group["params"] if parameter.ndim <= 1]
        split += [{**group, "params": matrices}] if matrices else []
        split += [{**group, "params": rest, "weight_decay": 0.0}] if rest else []
    return split


DECAY_RULES: dict[str, Callable[[Groups], Groups]] = {"all": decay_all, "matrices": decay_matrices}
"""Parameter groups → groups in which parameters without weight decay are in separate groups."""
