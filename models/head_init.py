"""HEAD_INITS: what the classifier knows before the first step. Each returns unit rows [C, D] for the head's weight."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.backbone import Text


@dataclass(frozen=True)
class HeadContext:
    """The training data, as seen by one process of a run.

    Args:
        features: iterates this process's share of the training images through the encoder: [B, D], labels [B].
        reduce: sum of a tensor over all processes.
    """

    class_names: Sequence[str]
    device: torch.device
    features: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    reduce: Callable[[Tensor], Tensor]


def text_feat(context: HeadContext, text: Text | None, prompt: str) -> Tensor:
    """w_c = normalise(P·t_c): text features carried back through the visual projection (LIFT §3.3).

    Without a projection of `text`, when the encoder itself projects: w_c = normalise(t_c).
    """
    assert text is not None, "a backbone without text tower was refused when the model was built"
    features = text.class_features(context.class_names, prompt, context.device)
    return F.normalize(features if text.projection is None else features @ text.projection.to(features), dim=-1)


def class_mean(context: HeadContext, text: Text | None, prompt: str) -> Tensor:
    """Mean of the raw features of a class, normalised. A class without images gets the mean of all."""
    sums: Tensor | None = None
    counts: Tensor | None = None
    for features, labels in context.features():
        if sums is None or counts is None:
            sums = features.new_zeros(len(context.class_names), features.shape[1], dtype=torch.float64)
            counts = features.new_zeros(len(context.class_names), 1, dtype=torch.float64)
        sums.index_add_(0, labels, features.double())
        counts.index_add_(0, labels, counts.new_ones(len(labels), 1))
    assert sums is not None and counts is not None, "the training split is never empty"
    sums, counts = context.reduce(sums), context.reduce(counts)
    means = torch.where(counts > 0, sums / counts.clamp_min(1), sums.sum(0) / counts.sum())
    return F.normalize(means, dim=-1).float()


HEAD_INITS: dict[str, Callable[[HeadContext, Text | None, str], Tensor]] = {
    "text_feat": text_feat,
    "class_mean": class_mean,
}
NEEDS_TEXT = frozenset({"text_feat"})
