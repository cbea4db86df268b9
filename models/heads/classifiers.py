"""HEADS: from features [B, D] to logits [B, C], under LIFT's names. Weights are fp32 and so are the logits."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailtune.configs.option import option


@dataclass(frozen=True)
class ScaleOptions:
    """Option of the cosine classifier, and of losses that change its logits."""

    scale: float = option(
        25.0,
        "Factor that the cosine classifier multiplies its logits with; LDAM's margins and GCL's noise have it too.",
        key="scale",
        least=0.0,
        held_with="head",
    )


class L2NormedClassifier(nn.Module):
    """z_c = f · w_c / |w_c|."""

    def __init__(self, dim: int, num_classes: int, scale: float) -> None:
        super().__init__()
        self.weight = unit_rows(num_classes, dim)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features.to(self.weight.dtype), F.normalize(self.weight, dim=-1))


class CosineClassifier(L2NormedClassifier):
    """z_c = σ·cos(f, w_c), σ fixed."""

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * super().forward(F.normalize(features.to(self.weight.dtype), dim=-1))


class LayerNormedClassifier(L2NormedClassifier):
    """z_c = LN(f) · w_c / |w_c|, a layer norm without weights of its own."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(F.layer_norm(features.to(self.weight.dtype), features.shape[-1:], eps=1e-12))


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
    "L2NormedClassifier": L2NormedClassifier,
    "LayerNormedClassifier": LayerNormedClassifier,
}
"""Name → (D, C, scale) → head; `scale` is the σ of the cosine head and nothing to the others."""
