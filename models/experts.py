"""Experts: several classifiers, on one feature or each on its own, whose logits are averaged."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


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
