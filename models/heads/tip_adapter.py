"""Tip-Adapter: text features and a cache of training images classify, and nothing is trained."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tailtune.configs.option import option
from tailtune.configs.value_parsers import as_float
from tailtune.models.heads.classifier import Classifier
from tailtune.models.heads.head_init import HeadContext, some_of_each_class


@dataclass(frozen=True)
class TipOptions:
    """Tip-Adapter."""

    shots: int = option(
        16, "Number of training images of each class that TipAdapter keeps.", least=1, most=100_000, held_with="head"
    )
    alpha: float = option(1.17, "Factor of the cache in the logits of TipAdapter.", least=0.0, held_with="head")
    beta: float = option(
        1.0,
        "How quickly the affinity of TipAdapter falls with the distance of two features.",
        least=0.0,
        held_with="head",
    )
    balanced: bool = option(
        True,
        "TipAdapter takes the mean of the affinities to the images of a class. False takes their sum, as the original, "
        "which prefers classes with more images.",
        held_with="head",
    )
    scale: float | None = option(
        None,
        "Factor of the cosine similarities of TipAdapter. None means the one that the model was trained with.",
        as_float,
        least=0.0,
        held_with="head",
    )


class TipAdapter(Classifier):
    """z_c = σ cos(f, t_c) + α Σ_j v_cj exp(−β (1 − cos(f, k_cj))), k_cj training images of class c.

    v_cj is 1, or with `balanced` 1 / their number. Source: Zhang et al., ECCV 2022, eq. 5. Without `balanced`, frequent
    classes win by their number, as far as `shots` lets them have more images.

    Args:
        dim: width d of the features.
        num_classes: number C of classes.
        shots, alpha, beta, balanced, scale: see `TipOptions`.
    """

    Options = TipOptions
    weight: Tensor
    keys: Tensor
    share: Tensor

    def __init__(
        self, dim: int, num_classes: int, shots: int, alpha: float, beta: float, balanced: bool, scale: float | None
    ) -> None:
        super().__init__()
        self.shots, self.alpha, self.beta, self.balanced, self.scale = shots, alpha, beta, balanced, scale
        self.register_buffer("weight", torch.zeros(num_classes, dim))
        self.register_buffer("keys", torch.zeros(num_classes, shots, dim))
        self.register_buffer("share", torch.zeros(num_classes, shots))

    def prepare(self, weight: Tensor, context: HeadContext) -> None:
        """Set text features [C, d], and encode the images of the cache."""
        self.weight.copy_(weight)
        positions = some_of_each_class(context, self.shots)
        labels = context.labels[positions]
        place = torch.zeros_like(context.labels)  # of an image among those of its class, which follow each other
        place[positions] = torch.arange(len(labels), device=labels.device) - torch.searchsorted(labels, labels)
        keys, share = torch.zeros_like(self.keys), torch.zeros_like(self.share)
        for features, seen in context.encode_images(positions):
            of_class = context.labels[seen]
            keys[of_class, place[seen]] = F.normalize(features.to(keys), dim=-1)
            share[of_class, place[seen]] = 1.0
        self.keys.copy_(context.sum_over_processes(keys))
        share = context.sum_over_processes(share)
        self.share.copy_(share / share.sum(1, keepdim=True).clamp_min(1) if self.balanced else share)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, d] → logits [B, C]."""
        features = F.normalize(features.to(self.weight.dtype), dim=-1)
        assert self.scale is not None, "filled by the model builder"
        nearness = torch.einsum("bd,ckd->bck", features, self.keys) - 1
        cache = ((self.beta * nearness).exp() * self.share).sum(-1)
        return self.scale * F.linear(features, F.normalize(self.weight, dim=-1)) + self.alpha * cache
