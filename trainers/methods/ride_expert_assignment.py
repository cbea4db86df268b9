"""RIDE's second stage: who decides how many experts an image needs (Wang et al., ICLR 2021)."""

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
from tailtune.trainers.methods.batch_mixer import BATCH_MIXER


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
    """Experts are asked one after the other until a small classifier says that the next ones would not help.

    After expert i: q_i = w · [t, ReLU(W_i f/|f|)] with its feature f and the largest logits t, in order, of the mean of
    the experts so far; the next expert is asked where sigmoid(q_i) > ½. w is shared by all i. What an earlier run
    trained is held.

    It learns from y_i = 1 where the mean up to i is wrong and one up to a later expert is right, by the mean over i of
    the binary cross-entropy with weight `pos_weight` for y = 1.
    """

    Options = Options
    continues_from_earlier_run = True
    predicts_as_earlier_run = True
    asks_every_expert = False
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
        """The heads are the earlier run's."""

    def forward(self, batch: Batch) -> Step:
        with torch.no_grad():
            features = self.model.features(batch["image"])
            logits = self.model.logits(features)
        return self.step(*self.assignment_loss(features, logits, batch), logits)

    def assignment_loss(self, features: Tensor, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features [B, D] or [B, E, D] and logits [B, E, C] → (weighted sum, sum of the weights)."""
        weights = self.sample_weights(batch)
        logits, features = present(logits, weights), present(features, weights)
        before = logits.cumsum(1)
        right = before.argmax(2) == batch["label"].unsqueeze(1)  # of the mean of the experts up to this one, [B, E]
        losses = []
        for i in range(len(self.hidden)):
            target = ~right[:, i] & right[:, i + 1 :].any(1)
            asks = self.asks(i, features if features.ndim == 2 else features[:, i], before[:, i] / (i + 1))
            weight = asks.new_tensor(self.options.pos_weight)
            losses.append(
                F.binary_cross_entropy_with_logits(asks, target.to(asks.dtype), pos_weight=weight, reduction="none")
            )
        return (torch.stack(losses).mean(0) * weights).sum(), weights.sum()

    def asks(self, expert: int, features: Tensor, logits: Tensor) -> Tensor:
        """q [B] after an expert, whose features are [B, D]; `logits` [B, C] are the mean of the experts so far."""
        own = self.output.weight.dtype
        wide = torch.promote_types(own, torch.float32)  # fp16 has neither normalize's ε nor the sum of the losses
        hidden = F.relu(self.hidden[expert](F.normalize(features.to(wide), dim=1).to(own)))
        top = logits.to(own).topk(self.top, dim=1).values
        return self.output(torch.cat([top, hidden], 1)).squeeze(1).to(wide)

    def expert_logits(self, images: Tensor) -> Tensor:
        """[B, E, C]; NaN of the experts that were not asked, and nothing of them was computed."""
        shared = self.model.trunk(images)
        going = torch.arange(len(shared), device=shared.device)
        found: Tensor | None = None
        for expert in range(self.model.num_experts):
            features, logits = self.model.expert(shared[going], expert)
            if found is None:
                found = logits.new_full((len(shared), self.model.num_experts, logits.shape[1]), torch.nan)
            found[going, expert] = logits
            if expert < len(self.hidden):
                asks = self.asks(expert, features, found[going, : expert + 1].mean(1))
                going = going[asks.sigmoid() > 0.5]
            if not len(going):
                break
        assert found is not None
        return found
