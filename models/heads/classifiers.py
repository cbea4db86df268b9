"""HEADS: from features [B, D] to logits [B, C], under LIFT's names. Weights are fp32 and so are the logits."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailtune.configs.option import NoOptions, option


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


class Classifier(nn.Module):
    """Base of all heads, which are made by (D, C) and the fields of their options."""

    Options: type = NoOptions


class L2NormedClassifier(Classifier):
    """z_c = f · w_c / |w_c|."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.weight = unit_rows(num_classes, dim)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features.to(self.weight.dtype), F.normalize(self.weight, dim=-1))


class CosineClassifier(L2NormedClassifier):
    """z_c = σ·cos(f, w_c), σ fixed."""

    Options = ScaleOptions

    def __init__(self, dim: int, num_classes: int, scale: float) -> None:
        super().__init__(dim, num_classes)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * super().forward(F.normalize(features.to(self.weight.dtype), dim=-1))


class LayerNormedClassifier(L2NormedClassifier):
    """z_c = LN(f) · w_c / |w_c|, a layer norm without weights of its own."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(F.layer_norm(features.to(self.weight.dtype), features.shape[-1:], eps=1e-12))


class LinearClassifier(Classifier):
    """z = W f + b."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, dim))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        nn.init.kaiming_normal_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features.to(self.weight.dtype), self.weight, self.bias)


def unit_rows(num_classes: int, dim: int) -> nn.Parameter:
    """U(-1, 1) rows of unit length [C, D]."""
    return nn.Parameter(F.normalize(torch.empty(num_classes, dim).uniform_(-1, 1), dim=-1))


HEADS: dict[str, type[Classifier]] = {
    "CosineClassifier": CosineClassifier,
    "LinearClassifier": LinearClassifier,
    "L2NormedClassifier": L2NormedClassifier,
    "LayerNormedClassifier": LayerNormedClassifier,
}
