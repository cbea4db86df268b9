"""What trains behind both encoders, in the space that images and texts share: CLIP-Adapter and the projections."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.configs.option import option
from tailtune.configs.seeding import seeded
from tailtune.configs.value_parsers import as_int
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.text_tower import TextTower
from tailtune.models.heads.text_classifier import TextClassifier
from tailtune.models.tuners.tuner_modules import BottleneckAdapter

NONE, ORIGINAL, RESIDUAL = "none", "original", "residual"


@dataclass(frozen=True)
class FeatureAdapterOptions:
    """What trains behind both encoders."""

    adapter: str = option(
        NONE,
        "CLIP-Adapter, a bottleneck layer behind the encoders: `original` on the features of images, or `residual`, "
        "that of LIFT+, on those of images and texts.",
        key="clip_adapter",
        choices=(NONE, ORIGINAL, RESIDUAL),
        zero_shot=False,
    )
    dim: int | None = option(
        None,
        "Bottleneck dimension of clip_adapter. None means 4 for `residual`, and a quarter of the feature for "
        "`original`.",
        as_int,
        key="clip_adapter_dim",
        least=1,
        most=4096,
        zero_shot=False,
        read_with=("clip_adapter",),
    )
    ratio: float = option(
        0.2,
        "Share of the output of clip_adapter `original` in the feature.",
        key="clip_adapter_ratio",
        least=0.0,
        most=1.0,
        zero_shot=False,
        held_with="texts",
        read_with=("clip_adapter original",),
    )
    projection: bool = option(
        False,
        "The projections of image and text features to their shared space train.",
        key="projection_tuning",
        zero_shot=False,
    )


class OriginalAdapter(nn.Module):
    """a · ReLU(W_2 ReLU(W_1 f)) + (1 − a) · f, without biases (Gao et al., IJCV 2024, eq. 2). It changes f at once.

    Args:
        width: width d of the features.
        dim: width of the bottleneck.
        ratio: the share a.
    """

    def __init__(self, width: int, dim: int, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.down_proj = nn.Linear(width, dim, bias=False)
        self.up_proj = nn.Linear(dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, d] → [B, d]."""
        hidden = F.relu(F.linear(x, self.down_proj.weight.to(x.dtype)))
        changed = F.relu(F.linear(hidden, self.up_proj.weight.to(x.dtype)))
        return self.ratio * changed + (1 - self.ratio) * x


class ResidualAdapter(BottleneckAdapter):
    """f + A(f), LIFT+'s form of CLIP-Adapter; it starts as the identity."""

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, d] → [B, d]."""
        return x + self.bottleneck(x, x.dtype)


def add_feature_adapters(
    encoder: Encoder, head: TextClassifier, tower: TextTower, options: FeatureAdapterOptions, seed: int
) -> None:
    """Let adapters act on the features, or the projections train. Call it after the tuners, which freeze the rest.

    Args:
        encoder: the image encoder.
        head: the classifier.
        tower: the text tower.
        options: which adapters.
        seed: seed of their initial weights.

    Raises:
        UserError: an image encoder without a projection.
    """
    with seeded(seed, "clip_adapter"):
        if options.adapter == ORIGINAL:
            head.adapter = OriginalAdapter(head.dim, options.dim or max(1, head.dim // 4), options.ratio)
        if options.adapter == RESIDUAL:
            head.adapter, tower.adapter = (ResidualAdapter(head.dim, options.dim or 4, uniform=True) for _ in range(2))
    if options.projection:
        if encoder.projection is None or tower.projection is None:
            raise UserError("projection_tuning: this image encoder has no projection of its own; choose a CLIP ViT")
        for projection in (encoder.projection, tower.projection):
            projection.requires_grad_(True)
