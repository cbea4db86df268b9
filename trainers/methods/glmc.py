"""GLMC: consistency of a mixed and a cut view, and a classifier that is balanced bit by bit (Du et al., CVPR 2023)."""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.configs.option import option
from tailtune.configs.seeding import generator, seeded
from tailtune.models import ClassificationModel
from tailtune.models.heads.head_init import HeadContext
from tailtune.trainers.losses import class_balanced, present, reweighted
from tailtune.trainers.methods.base import Batch, Method, Objective, Step


@dataclass(frozen=True)
class Options:
    label_weighting: float = option(
        1.2, "Exponent k of the class weights 1/n^k of the loss of the balanced classifier.", least=0.0
    )
    consistency: float = option(4.0, "Factor γ on the consistency of the two views.", least=0.0)
    dim: int = option(128, "Width of the projections whose consistency is trained.", least=1, most=10**5)


class Mixing(NamedTuple):
    """What is drawn for one step."""

    share: float  # λ: the share of the first image
    box: tuple[float, float]  # centre of the box that is taken from the second image, as shares of height and width


class GLMC(Method):
    """Loss: α (L(W) on both views) + (1 − α) (L_w(W_r) on both views) + γ (−cos(p₁, z₂) − cos(p₂, z₁)).

    Each sample is two images: one of `sampler` and one of `pair_sampler`, with two augmentations each. The first view
    is mixed (mixup), the second gets a box of the second image (cutmix), with one λ ~ Beta(1, 1). L is
    λ L(y) + (1 − λ) L(y′), and L_w weighs either term by 1/n^k of its label, scaled to mean 1. α = 1 − (e/E)² in epoch
    e of E. From `drw_epoch` on, the cosines have the class weights of the labels, too. z = h(f) is a linear projection
    of the features, and p = q(z) is another; z₂ and z₁ have no gradient.

    The prediction is that of W_r, the head of the model. W, h and q are for training only. λ and the box are the same
    for all images of a step, so that the micro-batch size does not change the loss.
    """

    Options = Options
    trains_new_head = True
    takes_image_pairs = True
    takes_two_views = True
    adds_up_samples = False  # an image has two labels
    can_be_wrapped = False
    depends_on_length = True
    class_weights: Tensor

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any = None) -> None:
        super().__init__(model, objective, options)
        if objective.loss.function in (class_balanced, reweighted):
            raise UserError("method glmc weighs the classes itself: use loss_type CE")
        width, dim = model.encoder.feature_dim, self.options.dim
        self.plain_head = copy.deepcopy(model.head)
        with seeded(objective.seed, "glmc"):
            self.projection, self.predictor = nn.Linear(width, dim), nn.Linear(dim, dim)
        weights = objective.class_counts.double() ** -self.options.label_weighting
        self.register_buffer("class_weights", weights / weights.mean(), persistent=False)
        self.alpha = 1.0
        """Weight of the plain classifier in the current epoch."""

    def prepare(self, context: HeadContext) -> None:
        """Initialise both classifiers alike."""
        super().prepare(context)
        self.plain_head.load_state_dict(self.model.head.state_dict())

    def on_epoch(self, epoch: int, epochs: int) -> None:
        super().on_epoch(epoch, epochs)
        self.alpha = 1 - (epoch / epochs) ** 2

    def forward(self, batch: Batch) -> Step:
        if not self.training:
            return super().forward(batch)
        mixing = draw(generator(self.objective.seed, "mixing", self.at_step))
        image, partner, other, other_partner = (
            self.model.normalised(batch[name]) for name in ("image", "partner", "other_image", "other_partner")
        )
        views = blended(image, partner, mixing.share), pasted(other, other_partner, mixing)
        features = [self.model.features(view) for view in views]
        logits = [self.head_logits(each) for each in features]
        plain = [self.plain_logits(each) for each in features]
        z = [self.projection(each.to(self.projection.weight.dtype)) for each in features]
        cosines = consistency([self.predictor(each) for each in z], z)
        return self.step(*self.mixture_loss(plain, logits, cosines, mixing.share, batch), logits[0])

    def plain_logits(self, features: Tensor) -> Tensor:
        """Features [B, D] or [B, E, D] → logits [B, E, C] of the classifier W."""
        logits = self.plain_head(features)
        logits = logits if logits.ndim == 3 else logits.unsqueeze(1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def mixture_loss(
        self, plain: list[Tensor], logits: list[Tensor], cosines: Tensor, share: float, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """The loss of two views.

        Args:
            plain: logits of W for each view [B, E, C].
            logits: logits of W_r for each view [B, E, C].
            cosines: what `consistency` returns [B].
            share: λ.
            batch: labels of both images, and weights.

        Returns:
            (weighted sum of the samples' losses, sum of the weights), both scalars.
        """
        total: Tensor | float = 0.0
        weight: Tensor | float = 0.0
        for labels, part in ((batch["label"], share), (batch["partner_label"], 1 - share)):
            of_plain = {**batch, "label": labels}
            of_balanced = of_plain | {"weight": batch["weight"] * self.class_weights.to(batch["weight"])[labels]}
            for one, other in zip(plain, logits, strict=True):
                loss_sum, weight_of_label = self.loss(one, of_plain)
                total = total + part * (self.alpha * loss_sum + (1 - self.alpha) * self.loss(other, of_balanced)[0])
            weight = weight + part * weight_of_label
            agreement = present(cosines, batch["weight"]) * self.sample_weights(of_plain)
            total = total - self.options.consistency * part * agreement.sum()
        return torch.as_tensor(total), torch.as_tensor(weight)

    def assumed_prior(self) -> Tensor:
        """An approximation: the prior of the configured loss, times 1/n^k."""
        weighted = super().assumed_prior() + self.class_weights.cpu().log()
        return weighted.log_softmax(1)


def draw(random: torch.Generator) -> Mixing:
    """Draw λ ~ Beta(1, 1) and the centre of the box."""
    share, row, column = torch.rand(3, generator=random, device="cpu", dtype=torch.float64).tolist()
    return Mixing(share, (row, column))


def blended(images: Tensor, partners: Tensor, share: float) -> Tensor:
    """λ x + (1 − λ) x′ for images [B, 3, H, W]."""
    return share * images + (1 - share) * partners


def pasted(images: Tensor, partners: Tensor, mixing: Mixing) -> Tensor:
    """Images [B, 3, H, W] with a box of x′, of ⌈H √(1 − λ)⌉ × ⌈W √(1 − λ)⌉ pixels before it is cut off at the borders.

    As in the original, λ is not corrected to the part of the box that lies inside.
    """
    sides = []
    for size, place in zip(images.shape[2:], mixing.box, strict=True):
        half = int(np.ceil(size * (1 - mixing.share) ** 0.5)) // 2
        centre = int(place * size)
        sides.append(slice(max(centre - half, 0), min(centre + half, size)))
    result = images.clone()
    result[:, :, sides[0], sides[1]] = partners[:, :, sides[0], sides[1]]
    return result


def consistency(p: list[Tensor], z: list[Tensor]) -> Tensor:
    """cos(p₁, z₂) + cos(p₂, z₁) of each sample [B], averaged over experts; z has no gradient (SimSiam)."""
    cosines = F.cosine_similarity(p[0], z[1].detach(), dim=-1) + F.cosine_similarity(p[1], z[0].detach(), dim=-1)
    return cosines if cosines.ndim == 1 else cosines.mean(1)
