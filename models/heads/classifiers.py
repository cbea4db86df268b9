"""HEADS: the classifiers, features [B, D] → logits [B, C], under LIFT's names. Weights and logits are fp32."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.configs.option import option
from tailtune.models.heads.classifier import Classifier
from tailtune.models.heads.text_classifier import TextClassifier
from tailtune.models.heads.tip_adapter import TipAdapter

__all__ = ["HEADS", "Classifier"]


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


class L2NormedClassifier(Classifier):
    """Rows of unit length: z_c = f · w_c / |w_c|.

    Args:
        dim: width D of the features.
        num_classes: number C of classes.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.weight = unit_rows(num_classes, dim)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, D] → logits [B, C]."""
        return F.linear(features.to(self.weight.dtype), F.normalize(self.weight, dim=-1))


class CosineClassifier(L2NormedClassifier):
    """Cosine similarities with a fixed scale σ: z_c = σ · cos(f, w_c); arguments as above, `scale` is σ.

    Raises:
        UserError: σ is 0.
    """

    Options = ScaleOptions

    def __init__(self, dim: int, num_classes: int, scale: float) -> None:
        super().__init__(dim, num_classes)
        if not scale:
            raise UserError("scale 0: the cosine classifier multiplies every logit with it; set it above 0, such as 25")
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, D] → logits [B, C]."""
        return self.scale * super().forward(F.normalize(features.to(self.weight.dtype), dim=-1))


class LayerNormedClassifier(L2NormedClassifier):
    """A layer norm without parameters before rows of unit length: z_c = LN(f) · w_c / |w_c|; arguments as above."""

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, D] → logits [B, C]."""
        return super().forward(F.layer_norm(features.to(self.weight.dtype), features.shape[-1:], eps=1e-12))


class LinearClassifier(Classifier):
    """A linear layer: z = W f + b.

    Args:
        dim: width D of the features.
        num_classes: number C of classes.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, dim))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        nn.init.kaiming_normal_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, D] → logits [B, C]."""
        return F.linear(features.to(self.weight.dtype), self.weight, self.bias)


def unit_rows(num_classes: int, dim: int) -> nn.Parameter:
    """A weight [C, D] drawn from U(-1, 1), with its rows scaled to unit length."""
    return nn.Parameter(F.normalize(torch.empty(num_classes, dim).uniform_(-1, 1), dim=-1))


HEADS: dict[str, type[Classifier]] = {
    "CosineClassifier": CosineClassifier,
    "LinearClassifier": LinearClassifier,
    "L2NormedClassifier": L2NormedClassifier,
    "LayerNormedClassifier": LayerNormedClassifier,
    "TipAdapter": TipAdapter,
    "TextClassifier": TextClassifier,  # its rows are the text features, which the text tower computes in training, too
}
"""Name → head; it is called with the width D, the number of classes C and the fields of its options."""
