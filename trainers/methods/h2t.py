"""H2T: retrains a classifier on features that are mixed with features of other images (Li et al., AAAI 2024).

The other images are mostly of frequent classes.
"""

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
from tailtune.trainers.methods.batchformer_layer import BATCH_MIXER
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
    """Loss while training: L(h(f̃), y). f̃ are the features of x, with a share ρ of the channels taken from those of x′.

    L is the loss of the inner method and h its classifier. The encoder of the earlier run is frozen; its classifiers
    are trained further. x has label y and is sampled by `sampler`, in the paper `balanced`. x′ is sampled by
    `pair_sampler` and may have any class. The replaced channels are drawn anew for each step. They are the same for all
    samples of a step, and different for each expert.

    The original replaces channels of the feature map before pooling. Pooling averages each channel separately, so that
    replacing channels of the pooled feature gives the same result. It is also possible with every backbone.
    """

    Options = Options
    continues_from_earlier_run = True
    trains_new_head = True
    can_be_wrapped = False

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any, inner: Method) -> None:
        super().__init__(model, objective, options, inner)
        opts = self.options
        if inner.continues_from_earlier_run:
            raise UserError(f"h2t.inner {opts.inner} continues an earlier run in a way of its own; try classify")
        if opts.shift_bn and not model.encoder.trained_batch_norms:
            raise UserError("h2t.shift_bn True: no batch norm of this model was trained; set h2t.shift_bn False")
        self.scales = (
            nn.Parameter(torch.ones(model.num_experts, len(objective.class_counts))) if opts.weight_scaling else None
        )
        self.freeze_trained(model.encoder, batch_norms_follow=opts.shift_bn)

    @property
    def takes_image_pairs(self) -> bool:
        return self.options.ratio > 0

    @property
    def takes_features(self) -> bool:
        return not self.loss_needs_images

    @property
    def changes_head_logits(self) -> bool:
        return self.scales is not None or super().changes_head_logits

    def discards(self, name: str) -> bool:
        return name.startswith(BATCH_MIXER)

    def prepare(self, context: HeadContext) -> None:
        """Do nothing: the heads are those of the earlier run."""

    def forward(self, batch: Batch) -> Step:
        if not self.training or not self.takes_image_pairs:
            return super().forward(batch)
        with torch.no_grad():
            first, second = (self.model.features(batch[name]) for name in ("image", "partner"))
        draws = generator(self.objective.seed, "h2t", self.at_step)  # the same channels for all micro-batches
        features = fused(first, second, self.options.ratio, self.model.num_experts, draws)
        return self.judged(self.head_logits(features), batch)

    def head_logits(self, features: Tensor) -> Tensor:
        """The inner method's logits [B, E, C]; with `weight_scaling`, times the trained class factors [E, C]."""
        logits = super().head_logits(features)
        return logits if self.scales is None else logits * self.scales


def fused(first: Tensor, second: Tensor, ratio: float, experts: int, draws: torch.Generator) -> Tensor:
    """Replace random channels of features by the channels of other images. The choice is the same for all samples.

    Args:
        first: features of the images [B, D], or [B, E, D] if the experts have separate features.
        second: features of the other images, in the same shape.
        ratio: share ρ of the channels that are replaced, 0 to 1.
        experts: number E of experts; the channels are drawn separately for each expert.
        draws: random generator on the CPU.

    Returns:
        Features [B, D] with one expert, else [B, E, D].
    """
    width = first.shape[-1]
    mask = torch.zeros(experts, width, dtype=torch.bool, device="cpu")
    for row in mask:
        row[channels(width, ratio, draws)] = True
    mask = moved(mask, first.device)
    if experts == 1:
        return torch.where(mask[0], second, first)
    if first.ndim == 2:  # the experts share the feature, but not the choice of channels
        first, second = first.unsqueeze(1), second.unsqueeze(1)
    return torch.where(mask, second, first)


def channels(width: int, ratio: float, draws: torch.Generator) -> Tensor:
    """Draw the ⌊ρ D⌋ channels that are replaced, for ρ = `ratio` and D = `width`."""
    return torch.randperm(width, generator=draws, device="cpu")[: int(ratio * width)]
