"""What a method is: model + objective in one module, which is what Accelerate wraps."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from configs.errors import UserError
from models import Classifier
from models.head_init import HeadContext
from trainers.checkpoint import trained_state
from trainers.losses import Loss, Prior, effective_weights, log_prior

Batch = dict[str, Any]
"""`image` uint8 [B, 3, H, W], `label` [B], `weight` [B] (0: left out), `index` [B]."""


class Step(NamedTuple):
    """The outcome of one micro-batch. Sums, not means."""

    loss_sum: Tensor
    weight: Tensor
    logits: Tensor  # [B, C]
    logs: dict[str, Tensor]


@dataclass(frozen=True)
class NoOptions:
    """A method without options of its own."""


@dataclass(frozen=True)
class Objective:
    """What a method is told of the data and the loss."""

    class_counts: Tensor  # [C]
    loss: Loss
    tau: float = 1.0
    scale: float = 25.0
    coupled: bool = False
    """The loss depends on which samples share a micro-batch."""
    drw_epoch: int | None = None
    """From this epoch on (the first is 0) a sample's weight is multiplied by its class's `effective_weights`."""


class Method(nn.Module):
    """Base of all methods; on its own it trains a classifier with one loss on the mean of its experts' logits.

    Class attributes:
        Options: dataclass; its fields are the options `<method>.<field>`, texts in `metadata["doc"]`.
        couples: the method's value depends on which samples share a micro-batch.
    """

    Options: type = NoOptions
    couples: bool = False
    log_prior: Tensor
    class_counts: Tensor

    def __init__(self, model: Classifier, objective: Objective, options: Any = None) -> None:
        super().__init__()
        self.model = model
        self.options = options
        self.objective = objective
        self.epoch = 0
        self.register_buffer("log_prior", log_prior(objective.class_counts), persistent=False)
        self.register_buffer("class_counts", objective.class_counts, persistent=False)

    @property
    def batch_coupled(self) -> bool:
        """Whether another micro-batch size is another objective."""
        return self.couples or self.objective.coupled or self.model.batch_coupled

    @property
    def prior(self) -> Prior:
        return Prior(self.log_prior, self.class_counts, self.objective.tau, self.objective.scale)

    def forward(self, batch: Batch) -> Step:
        logits = self.predict(batch["image"])
        loss_sum, weight = self.objective.loss(logits, batch["label"], self.sample_weights(batch), self.prior)
        penalty = self.model.penalty()
        if penalty is not None:  # of the mean loss, here multiplied by the weight that the trainer divides by
            loss_sum = loss_sum + weight * penalty
        return Step(loss_sum, weight, logits, {})

    def sample_weights(self, batch: Batch) -> Tensor:
        """What each sample counts in the loss, [B]: its own weight and, once `drw_epoch` has come, its class's.

        Deferred re-weighting (Cao et al. 2019) for any loss; a `forward` of one's own takes its weights from here.
        The batch stays as it is: the trainer counts by it.
        """
        weights: Tensor = batch["weight"]
        if self.objective.drw_epoch is None or self.epoch < self.objective.drw_epoch:
            return weights
        return weights * effective_weights(self.class_counts.double()).to(weights.dtype)[batch["label"]]

    def expert_logits(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] → [B, E, C]."""
        return self.model(images)

    def aggregate(self, logits: Tensor, weights: Tensor | None = None) -> Tensor:
        """[B, E, C] → [B, C], by the weights [E] or the mean."""
        return logits.mean(1) if weights is None else (logits * weights.view(1, -1, 1)).sum(1)

    def predict(self, images: Tensor) -> Tensor:
        return self.aggregate(self.expert_logits(images))

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of what trains, in a stable order, which is what a saved optimizer state goes by."""
        head = {id(parameter) for parameter in self.model.head.parameters()}
        trains = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = {
            "tuner": [parameter for parameter in trains if id(parameter) not in head],
            "head": [parameter for parameter in trains if id(parameter) in head],
        }
        return [{"name": name, "params": params} for name, params in groups.items() if params]

    def prepare(self, context: HeadContext) -> None:
        """Once, before the first step of a fresh run."""
        self.model.init_head(context)

    def start_from(self, tensors: dict[str, Tensor]) -> None:
        """Begin where an earlier run ended (`after`), with all that it trained.

        Raises:
            UserError: the earlier run trained what this one does not; it would be lost.
        """
        own = trained_state(self)
        lost = [n for n, each in tensors.items() if n not in own or own[n].shape != each.shape]
        if lost:
            raise UserError(
                f"after: the earlier run trained {lost[0]} and {len(lost) - 1} more tensors that this run does not "
                "train; give both the same tuners and head, or this one more"
            )
        with torch.no_grad():
            for name, each in tensors.items():
                own[name].copy_(each)

    def before_training(self, steps: int) -> None:
        """Once a launch, before the first step, also when it resumes; `steps` is the length of the whole run."""
        self.model.before_training(steps)

    def on_epoch(self, epoch: int, epochs: int) -> None:
        """Before each epoch, and before the rest of one that is resumed. Who overrides it calls `super`'s too."""
        self.epoch = epoch

    def after_step(self, step: int) -> None:
        """After each optimizer step, counted from 1 over the whole run, while its gradients are still there."""
        self.model.after_step(step)
