"""One head for each expert; the logits of the experts are averaged later."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailtune.configs.seeding import generator

PERTURBATION = 0.01
"""How far the heads of experts start from each other, as a share of the length of a row."""


class ExpertHeads(nn.ModuleList):
    """The heads of E experts.

    Args:
        heads: E heads, features [B, D] → logits [B, C].
    """

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__(heads)

    def forward(self, features: Tensor) -> Tensor:
        """Classify features with every head.

        Args:
            features: [B, D], shared by all experts, or [B, E, D].

        Returns:
            Logits [B, E, C].
        """
        per_expert = [features] * len(self) if features.ndim == 2 else features.unbind(1)
        return torch.stack([head(inputs) for head, inputs in zip(self, per_expert, strict=True)], dim=1)


def heads_of(head: nn.Module) -> list[nn.Module]:
    """The heads of all experts; a head that is no `ExpertHeads` is the only one."""
    return list(head) if isinstance(head, ExpertHeads) else [head]


def perturb_for_expert(weight: Tensor, expert: int, seed: int) -> Tensor:
    """The weight with which an expert's head starts, when the same initial weight is given to all experts.

    Without a perturbation, experts that share everything else would get equal gradients and stay equal forever.

    Args:
        weight: the initial weight [C, D].
        expert: index of the expert; the first one gets the weight unchanged.
        seed: seed of the perturbation.

    Returns:
        The weight [C, D], each row moved in a random direction by `PERTURBATION` times its length.
    """
    if expert == 0:
        return weight
    noise = torch.randn(weight.shape, generator=generator(seed, "expert", expert)).to(weight)
    return weight + PERTURBATION * weight.norm(dim=-1, keepdim=True) * F.normalize(noise, dim=-1)
