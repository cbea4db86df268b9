"""H2T: a classifier retrained on features into which those of frequent classes are mixed (Li et al., AAAI 2024)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.configs.option import option
from tailtune.configs.seeding import generator
from tailtune.models import ClassificationModel
from tailtune.models.heads.head_init import HeadContext
from tailtune.trainers.losses import moved
from tailtune.trainers.methods.base import Batch, Method, Objective, Step
from tailtune.trainers.methods.batch_mixer import BATCH_MIXER
from tailtune.trainers.methods.wrapper import Wrapper


@dataclass(frozen=True)
class Options:
    inner: str = option("classify", "Method whose loss is computed on the fused features.", table="METHODS")
    ratio: float = option(
        0.25,
        "Share of a feature's channels that come from the second image; 0 means none.",
        least=0.0,
        most=1.0,
    )
    shift_bn: bool = option(True, "The batch norms of the frozen encoder follow the images. False freezes them too.")
    weight_scaling: bool = option(
        False, "A factor on the logit of each class is learnt beside the classifier, as in MisLAS."
    )


class H2T(Wrapper):
    """L(h(f̃), y), f̃ the features of x in which ρ of the channels are those of x′, while training.

    The encoder is the earlier run's and is held; its classifiers go on training. y is the label of x, which the
    sampler draws `balanced`, x′ the pair sampler's image, of any class. Which channels is drawn for each step, one
    choice for all its samples and, of several experts, another for each. L is the inner method's.

    The original overwrites channels of the map before it is pooled. Pooling takes the mean of each channel by itself,
    so channels of the pooled feature are the same thing, and any backbone's feature has channels.
    """

    Options = Options
    continues_from_earlier_run = True
    can_be_wrapped = False

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any, inner: Method) -> None:
        super().__init__(model, objective, options, inner)
        own = self.options
        if inner.continues_from_earlier_run:
            raise UserError(f"h2t.inner {own.inner} continues an earlier run in a way of its own; try classify")
        if own.shift_bn and not model.encoder.trained_batch_norms:
            raise UserError("h2t.shift_bn True: no batch norm of this model was trained; set h2t.shift_bn False")
        self.scales = (
            nn.Parameter(torch.ones(model.num_experts, len(objective.class_counts))) if own.weight_scaling else None
        )
        self.freeze_trained(model.encoder, batch_norms_follow=own.shift_bn)

    @property
    def takes_image_pairs(self) -> bool:
        return self.options.ratio > 0

    @property
    def changes_head_logits(self) -> bool:
        return self.scales is not None or super().changes_head_logits

    def discards(self, name: str) -> bool:
        return name.startswith(BATCH_MIXER)

    def prepare(self, context: HeadContext) -> None:
        """The heads are the earlier run's."""

    def forward(self, batch: Batch) -> Step:
        if not self.training or not self.takes_image_pairs:
            return super().forward(batch)
        with torch.no_grad():
            first, second = (self.model.features(batch[name]) for name in ("image", "partner"))
        draws = generator(self.objective.seed, "h2t", self.at_step)  # one choice, however the batch is cut
        features = fused(first, second, self.options.ratio, self.model.num_experts, draws)
        logits = self.head_logits(features)
        return self.step(*self.loss(logits, batch), logits)

    def head_logits(self, features: Tensor) -> Tensor:
        """The inner method's logits [B, E, C], times the learnt factors of classes where there are some."""
        logits = super().head_logits(features)
        return logits if self.scales is None else logits * self.scales


def fused(first: Tensor, second: Tensor, ratio: float, experts: int, draws: torch.Generator) -> Tensor:
    """Features of which some channels are another image's, the same ones for all samples.

    Args:
        first, second: [B, D], or [B, E, D] of experts with features of their own.
        ratio: share of the channels.
        experts: how many have a choice of channels for themselves.
        draws: on the CPU.

    Returns:
        [B, D] of one expert, else [B, E, D].
    """
    width = first.shape[-1]
    mask = torch.zeros(experts, width, dtype=torch.bool, device="cpu")
    for row in mask:
        row[channels(width, ratio, draws)] = True
    mask = moved(mask, first.device)
    if experts == 1:
        return torch.where(mask[0], second, first)
    if first.ndim == 2:  # they share the feature, but not the choice
        first, second = first.unsqueeze(1), second.unsqueeze(1)
    return torch.where(mask, second, first)


def channels(width: int, ratio: float, draws: torch.Generator) -> Tensor:
    """The ⌊ρ D⌋ channels that are overwritten."""
    return torch.randperm(width, generator=draws, device="cpu")[: int(ratio * width)]
