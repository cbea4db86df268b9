"""Scores: logits of images that are corrected for class priors. They are computed when they are read."""

import torch
from torch import Tensor

from tailtune.trainers.evaluation.inference import Logits
from tailtune.trainers.evaluation.rows import MadeRows, Rows
from tailtune.trainers.methods.base import combine

NEVER = 1e-12
"""Lower bound of a class frequency, so that its logarithm is finite."""


def scores_of(found: Logits, hot: float = 1.0, prior: Tensor | float = 0.0, chosen: Tensor | None = None) -> Rows:
    """z/T − log p [n, C], with the mean z of the experts' logits.

    Args:
        found: logits of images.
        hot: temperature T.
        prior: log p, fp32 [C].
        chosen: rows of `found`, int64 [n]; None: all.
    """
    logits = found.logits
    chosen = torch.arange(len(logits)) if chosen is None else chosen
    return MadeRows((len(chosen), logits.shape[-1]), lambda rows: combine(logits[chosen[rows]]) / hot - prior)


def shifted(scores: Rows, frequencies: Rows) -> Rows:
    """s + log q [n, C].

    Args:
        scores: s of images [n, C].
        frequencies: class frequencies q of each image [n, C], or [1, C] if they are equal for all images.
    """

    def make(rows: Tensor) -> Tensor:
        used = frequencies[rows] if len(frequencies) > 1 else frequencies[:1]
        return scores[rows] + used.clamp_min(NEVER).log().float()

    return MadeRows(tuple(scores.shape), make)
