"""Experts: several classifiers, on one feature or each on its own, whose logits are averaged."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailtune.configs.seeding import generator

APART = 0.01
"""Of a row's length: how far heads that are given the same start begin from each other."""


class ExpertHeads(nn.ModuleList):
    """One head for each expert.

    Args:
        heads: E heads, features [B, D] → logits [B, C].
    """

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__(heads)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, D] that all experts share, or [B, E, D] → logits [B, E, C]."""
        own = [features] * len(self) if features.ndim == 2 else features.unbind(1)
        return torch.stack([head(each) for head, each in zip(self, own, strict=True)], dim=1)


def heads_of(head: nn.Module) -> list[nn.Module]:
    """The head of every expert, one for a model without experts."""
    return list(head) if isinstance(head, ExpertHeads) else [head]


def apart(weight: Tensor, expert: int, seed: int) -> Tensor:
    """The rows [C, D] that the head of an expert begins with, where all are given the same; the first gets these.

    Experts that are alike in everything have the same gradients and stay one, whatever rewards a difference.
    """
    if expert == 0:
        return weight
    noise = torch.randn(weight.shape, generator=generator(seed, "expert", expert)).to(weight)
    return weight + APART * weight.norm(dim=-1, keepdim=True) * F.normalize(noise, dim=-1)
