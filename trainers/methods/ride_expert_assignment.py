"""RIDE's second stage: a small network decides how many experts each image needs (Wang et al., ICLR 2021)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.configs.option import option
from tailtune.configs.seeding import seeded
from tailtune.models import ClassificationModel
from tailtune.models.heads.head_init import HeadContext
from tailtune.trainers.losses import present
from tailtune.trainers.methods.base import Batch, Method, Objective, Step
from tailtune.trainers.methods.batchformer_layer import BATCH_MIXER


@dataclass(frozen=True)
class Options:
    top_choices: int = option(
        30,
        "Number of largest logits that decide whether the next expert is asked; of fewer classes, all.",
        least=1,
        most=10**5,
    )
    hidden: int = option(
        16,
        "Size of the layer that reads the feature to decide whether the next expert is asked.",
        least=1,
        most=10**4,
    )
    pos_weight: float = option(
        100.0, "Weight in the loss of the images that a later expert would get right.", least=0.0
    )


class ExpertAssignment(Method):
    """The experts compute an image one after the other, until a binary classifier predicts that more do not help.

    After expert i the classifier computes q_i = w · [t, ReLU(W_i f/|f|)]. f is the feature of expert i; t are the
    largest logits, sorted, of the mean of the experts up to i. The next expert is used if sigmoid(q_i) > ½. The
    weights w are shared by all i. The weights of the earlier run are frozen.

    The target y_i is 1 if the mean of the experts up to i is wrong and the mean up to a later expert is right. The loss
    is the mean over i of the binary cross-entropy, with weight `pos_weight` for y_i = 1.
    """

    Options = Options
    continues_from_earlier_run = True
    predicts_as_earlier_run = True
    asks_every_expert = False
    adds_up_samples = False  # the loss is not of the classes
    can_be_wrapped = False

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any = None) -> None:
        super().__init__(model, objective, options)
        hidden = self.options.hidden
        if model.num_experts < 2:
            raise UserError("ride_ea chooses among experts, and this model has one; set num_experts as the earlier run")
        self.top = min(self.options.top_choices, len(objective.class_counts))
        with seeded(objective.seed, "expert assignment"):
            dim = model.encoder.feature_dim
            self.hidden = nn.ModuleList(nn.Linear(dim, hidden) for _ in range(model.num_experts - 1))
            self.output = nn.Linear(self.top + hidden, 1)
        self.freeze_trained(model)

    def discards(self, name: str) -> bool:
        return name.startswith(BATCH_MIXER)

    def prepare(self, context: HeadContext) -> None:
        """Do nothing: the heads are those of the earlier run."""

    def forward(self, batch: Batch) -> Step:
        with torch.no_grad():
            features = self.model.features(batch["image"])
            logits = self.model.logits(features)
        return self.step(*self.assignment_loss(features, logits, batch), logits)

    def assignment_loss(self, features: Tensor, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of the binary classifiers.

        Args:
            features: [B, D] or [B, E, D].
            logits: of the experts [B, E, C].
            batch: labels and weights of the samples.

        Returns:
            (weighted sum of the samples' losses, sum of the weights), both scalars.
        """
        weights = self.sample_weights(batch)
        logits, features = present(logits, weights), present(features, weights)
        before = logits.cumsum(1)
        right = before.argmax(2) == batch["label"].unsqueeze(1)  # is the mean up to each expert correct? [B, E]
        losses = []
        for i in range(len(self.hidden)):
            target = ~right[:, i] & right[:, i + 1 :].any(1)
            q = self.asks(i, features if features.ndim == 2 else features[:, i], before[:, i] / (i + 1))
            weight = q.new_full((), self.options.pos_weight)  # made on the device, so that no step waits for a copy
            losses.append(
                F.binary_cross_entropy_with_logits(q, target.to(q.dtype), pos_weight=weight, reduction="none")
            )
        return (torch.stack(losses).mean(0) * weights).sum(), weights.sum()

    def asks(self, expert: int, features: Tensor, logits: Tensor) -> Tensor:
        """The output q of the binary classifier after an expert.

        Args:
            expert: index i of the expert, from 0.
            features: features of this expert [B, D].
            logits: mean of the logits of the experts up to this one [B, C].

        Returns:
            q [B], in at least fp32.
        """
        dtype = self.output.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)  # fp16 can hold neither the ε of `normalize` nor loss sums
        hidden = F.relu(self.hidden[expert](F.normalize(features.to(wide), dim=1).to(dtype)))
        top = logits.to(dtype).topk(self.top, dim=1).values
        return self.output(torch.cat([top, hidden], 1)).squeeze(1).to(wide)

    def expert_logits(self, images: Tensor) -> Tensor:
        """Logits of each expert [B, E, C]. Logits of a skipped expert are NaN; it does not compute the image at all."""
        shared = self.model.trunk(images)
        active = torch.arange(len(shared), device=shared.device)  # images that need the next expert
        all_logits: Tensor | None = None
        for expert in range(self.model.num_experts):
            features, logits = self.model.expert(shared[active], expert)
            if all_logits is None:
                all_logits = logits.new_full((len(shared), self.model.num_experts, logits.shape[1]), torch.nan)
            all_logits[active, expert] = logits
            if expert < len(self.hidden):
                q = self.asks(expert, features, all_logits[active, : expert + 1].mean(1))
                active = active[q.sigmoid() > 0.5]
            if not len(active):
                break
        assert all_logits is not None
        return all_logits
