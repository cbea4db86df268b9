"""HEADS: from features [B, D] to logits [B, C], under LIFT's names. Weights are fp32 and so are the logits."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineClassifier(nn.Module):
    """z_c = σ·cos(f, w_c), σ fixed."""

    def __init__(self, dim: int, num_classes: int, scale: float) -> None:
        super().__init__()
        self.weight = unit_rows(num_classes, dim)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        features = F.normalize(features.to(self.weight.dtype), dim=-1)
        return self.scale * F.linear(features, F.normalize(self.weight, dim=-1))


class LinearClassifier(nn.Module):
    """z = W f + b."""

    def __init__(self, dim: int, num_classes: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, dim))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        nn.init.kaiming_normal_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features.to(self.weight.dtype), self.weight, self.bias)


def unit_rows(num_classes: int, dim: int) -> nn.Parameter:
    """U(-1, 1) rows of unit length [C, D]."""
    return nn.Parameter(F.normalize(torch.empty(num_classes, dim).uniform_(-1, 1), dim=-1))


HEADS: dict[str, Callable[[int, int, float], nn.Module]] = {
    "CosineClassifier": CosineClassifier,
    "LinearClassifier": LinearClassifier,
}
