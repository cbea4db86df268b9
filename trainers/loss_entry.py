"""`Loss`, an entry of the table of losses, and what the losses have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tailtune.configs.seeding import generator


class Prior(NamedTuple):
    """The training distribution, as the losses read it."""

    log_prior: Tensor  # [C] log of the class frequencies
    counts: Tensor  # [C] number of training images of each class
    draws: Callable[[str], torch.Generator] = generator
    """Purpose of a random draw → a CPU generator for this one draw."""


Sums = tuple[Tensor, Tensor]
"""(weighted sum of the samples' losses, sum of the weights), both scalars."""


def as_drawn(drawn: Tensor, prior: Prior, options: Any) -> Tensor:
    """For losses without logit adjustment: the logits assume the class frequencies as sampled.

    The arguments and the result are those of `Loss.assumes`.
    """
    return drawn


@dataclass(frozen=True)
class Loss:
    """An entry of LOSSES, with its options. Called with (logits [B, C], labels [B], sample weights [B], prior)."""

    function: Callable[..., Sums]
    """(logits, labels, sample weights, prior[, options]) → sums. A loss without options gets no fifth argument."""
    assumes: Callable[[Tensor, Prior, Any], Tensor]
    """The class prior for which softmax(logits) is the correct posterior once the loss is minimised.

    Arguments: log class frequencies of the samples as they are drawn and weighted [C]; the prior; the options.
    Result: the log class prior [C], up to an additive constant. `target_prior` reads it.
    """
    options: Any = None
    """An instance of the loss's dataclass of `option`s, or None. In the table it holds the defaults."""
    couples: bool = False
    """Whether the value depends on which samples share a micro-batch."""
    adjusts: bool = False
    """Whether the loss adjusts the logits by the class frequencies."""

    def __call__(self, logits: Tensor, labels: Tensor, weights: Tensor, prior: Prior) -> Sums:
        options = () if self.options is None else (self.options,)
        return self.function(logits, labels, weights, prior, *options)


def without_prior(drawn: Tensor, prior: Prior, options: Any) -> Tensor:
    """For losses that compensate for the training prior: the logits assume the sampled over the training frequencies.

    The arguments and the result are those of `Loss.assumes`.
    """
    return drawn - prior.log_prior


def present(logits: Tensor, weights: Tensor) -> Tensor:
    """Replace the logits of samples of weight 0 by zeros.

    Such logits may be NaN or infinite, and multiplying them by 0 would give NaN.

    Args:
        logits: [B, …].
        weights: weight of each sample [B].
    """
    return torch.where(weights.view(-1, *[1] * (logits.ndim - 1)) > 0, logits, 0.0)
