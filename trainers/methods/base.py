"""What a method is: model + objective in one module, which is what Accelerate wraps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.configs.seeding import generator
from tailtune.models import ClassificationModel
from tailtune.models.backbones.encoder import Encoder, StagedModule
from tailtune.models.heads.head_init import HeadContext
from tailtune.trainers.losses import Prior, effective_weights, log_prior
from tailtune.trainers.methods.objective import Batch, NoOptions, Objective, Step, combine
from tailtune.trainers.storage.checkpoint import trained_state

__all__ = ["Batch", "Earlier", "Method", "NoOptions", "Objective", "Step", "combine"]


@dataclass(frozen=True)
class Earlier:
    """The finished run that `after` names, for the method of the run that follows."""

    fresh: bool
    """This run has just begun; else it resumes, and has what it took over already."""
    tensors: Callable[[], dict[str, Tensor]]
    """The tensors that it trained, by name; raises a `UserError` for another base model or other classes than here."""
    method: Callable[[], "Method"]
    """The trained method of that run: frozen, in eval mode, on the device."""


class Method(StagedModule):
    """Base of all methods; on its own it trains a classifier with one loss on the mean of its experts' logits.

    A new method usually overrides `loss`, which takes the experts' logits. One that needs more than logits overrides
    `forward`. Other code asks a method what it is by the properties below, never by its class; a subclass answers
    with a class attribute or a property of that name. Two facts are asked of the class, before a model is built.

    Class attributes:
        Options: dataclass; its fields are the options `<method>.<field>`, texts in `metadata["doc"]`.
        depends_on_batch: the loss of an image depends on the images that share its micro-batch.
        continues_from_earlier_run: the method needs a finished run, which `after` names.
    """

    Options: type = NoOptions
    depends_on_batch: bool = False
    continues_from_earlier_run: bool = False
    log_prior: Tensor
    class_counts: Tensor

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any = None) -> None:
        super().__init__()
        self.model = model
        self.options = options
        self.objective = objective
        self.epoch = 0
        self.at_step = 0
        """The optimizer step, counted from 1 over the whole run."""
        self._drawn = 0
        self.register_buffer("log_prior", log_prior(objective.class_counts), persistent=False)
        self.register_buffer("class_counts", objective.class_counts, persistent=False)

    # --- what a method is ----------------------------------------------------------------------------------------

    @property
    def asks_every_expert(self) -> bool:
        """Whether every expert predicts every image; if not, `expert_logits` holds NaN for the others."""
        return True

    @property
    def changes_head_logits(self) -> bool:
        """Whether `head_logits` returns something else than the logits of the heads."""
        return False

    @property
    def loss_needs_images(self) -> bool:
        """Whether `loss` reads the images of the batch, not their logits alone."""
        return False

    @property
    def takes_image_pairs(self) -> bool:
        """Whether a batch needs a second image beside each, `partner`, which `pair_sampler` chooses."""
        return False

    @property
    def can_be_wrapped(self) -> bool:
        """Whether `loss`, `head_logits` and `aggregate` are all of it, so that a `Wrapper` may run the model itself.

        A method that overrides `forward` or `expert_logits` says False.
        """
        return True

    @property
    def starts_where_earlier_run_ended(self) -> bool:
        """Whether the run that `after` names, if any, gives the weights to start from; a teacher does not."""
        return True

    def discards(self, name: str) -> bool:
        """Whether this method has no use for a tensor, by its name, that the earlier run has trained."""
        return False

    @property
    def predicts_as_earlier_run(self) -> bool:
        """Whether the logits are those of the earlier run, whatever this run trains beside them."""
        return False

    @property
    def batch_coupled(self) -> bool:
        """Whether another micro-batch size is another objective, by the method, its loss or its model."""
        return self.depends_on_batch or self.objective.loss.couples or self.model.batch_coupled

    # --- what it computes ----------------------------------------------------------------------------------------

    @property
    def prior(self) -> Prior:
        return Prior(self.log_prior, self.class_counts, self.draws)

    def forward(self, batch: Batch) -> Step:
        logits = self.expert_logits(batch["image"])
        return self.step(*self.loss(logits, batch), logits)

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Expert logits [B, E, C] → (weighted sum of the samples' losses, sum of the weights), both scalars."""
        return self.loss_of(self.aggregate(logits), batch)

    def loss_of(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The configured loss of one classifier's logits [B, C], as `loss`."""
        return self.objective.loss(logits, batch["label"], self.sample_weights(batch), self.prior)

    def loss_of_each(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The configured loss of every expert's logits [B, E, C] for itself, added up; the weight is that of one."""
        terms = [self.loss_of(of_expert, batch) for of_expert in logits.unbind(1)]
        return torch.stack([loss_sum for loss_sum, _ in terms]).sum(), terms[0][1]

    def step(self, loss_sum: Tensor, weight: Tensor, logits: Tensor) -> Step:
        """What `forward` returns, for expert logits [B, E, C]; adds what the tuners ask for."""
        penalty = self.model.penalty()
        if penalty is not None:  # of the mean loss, here multiplied by the weight that the trainer divides by
            loss_sum = loss_sum + weight * penalty
        return Step(loss_sum, weight, self.aggregate(logits))

    @property
    def deferred(self) -> bool:
        """Whether `drw_epoch` has come."""
        return self.objective.drw_epoch is not None and self.epoch >= self.objective.drw_epoch

    def sample_weights(self, batch: Batch) -> Tensor:
        """What each sample counts in the loss, [B]: its own weight and, once `drw_epoch` has come, its class's.

        Deferred re-weighting (Cao et al. 2019) for any loss; a method with a `forward` takes its weights from here.
        The batch stays as it is: the trainer counts by it.
        """
        weights: Tensor = batch["weight"]
        if not self.deferred:
            return weights
        return weights * effective_weights(self.class_counts.double()).to(weights.dtype)[batch["label"]]

    def head_logits(self, features: Tensor) -> Tensor:
        """Features [B, D] or [B, E, D] → logits of each expert [B, E, C], whose mean is the prediction."""
        return self.model.logits(features)

    def expert_logits(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] → [B, E, C]."""
        return self.head_logits(self.model.features(images))

    def aggregate(self, logits: Tensor, weights: Tensor | None = None) -> Tensor:
        """[B, E, C] → [B, C], by the weights [E] or the mean."""
        return combine(logits, weights)

    def predict(self, images: Tensor) -> Tensor:
        return self.aggregate(self.expert_logits(images))

    def assumed_prior(self) -> Tensor:
        """log p [E, C] in fp64: the class prior of which the logits of each expert are the posterior.

        Logits for another prior q are z + log q − log p. A method that changes logits before the loss overrides this.
        """
        return self.objective.assumed().expand(self.model.num_experts, -1)

    def counts(self) -> dict[str, int]:
        """Numbers of parameters: the model's, and those of the method itself, which count as a tuner's."""
        of_model, counts = {id(parameter) for parameter in self.model.parameters()}, self.model.counts()
        rest = [parameter for parameter in self.parameters() if id(parameter) not in of_model]
        trains = sum(parameter.numel() for parameter in rest if parameter.requires_grad)
        more = {"total": sum(parameter.numel() for parameter in rest), "tuner": trains, "trainable": trains}
        return {name: count + more.get(name, 0) for name, count in counts.items()}

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

    def after(self, earlier: Earlier) -> None:
        """Take what is needed of the run that `after` names; once a launch that trains, before its first step."""
        if earlier.fresh:
            self.start_from(earlier.tensors())

    def freeze_trained(self, *parts: nn.Module, batch_norms_follow: bool = False) -> None:
        """Freeze what trains in parts of this method; a checkpoint still holds it.

        Args:
            parts: modules of this method, such as its encoder.
            batch_norms_follow: see `Encoder.freeze_trained`.
        """
        for module in (module for part in parts for module in part.modules()):
            if isinstance(module, Encoder):
                module.freeze_trained(batch_norms_follow)
        inside = {id(parameter) for part in parts for parameter in part.parameters()}
        for name, parameter in self.named_parameters():
            if id(parameter) in inside and parameter.requires_grad:
                self.frozen_trained.add(name)
                parameter.requires_grad_(False)

    def start_from(self, tensors: dict[str, Tensor]) -> None:
        """Copy what an earlier run trained, to begin where it ended.

        Raises:
            UserError: as `taken_over`.
        """
        state = trained_state(self)
        with torch.no_grad():
            for name, tensor in self.taken_over(tensors).items():
                state[name].copy_(tensor)

    def fits(self, earlier: "Method") -> None:
        """Raise a `UserError` if this run cannot continue the one of an `earlier` method, which is not trained yet."""
        self.taken_over(trained_state(earlier))

    def taken_over(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What an earlier run trained, without what this one has no use for.

        Raises:
            UserError: the earlier run trained what this one does not, which would be lost, or not what this one keeps.
        """
        state = trained_state(self)
        tensors = {name: tensor for name, tensor in tensors.items() if not self.discards(name)}
        lost = [name for name, tensor in tensors.items() if name not in state or state[name].shape != tensor.shape]
        if lost:
            raise UserError(
                f"after: the earlier run trained {lost[0]} and {len(lost) - 1} more tensors that this run does not "
                "train; give both the same tuners, experts and head, or this one more"
            )
        if missing := self.frozen_trained - tensors.keys():
            raise UserError(
                f"after: this run keeps {min(missing)} as the earlier run trained it, which did not; give both the "
                "same tuners, experts and head"
            )
        return tensors

    def before_training(self, steps: int, per_epoch: int) -> None:
        """Once a launch, before the first step, also when it resumes.

        Args:
            steps: of the whole run.
            per_epoch: of an epoch, as many as it would have without `max_steps`.
        """
        if not self.model.encoder.is_frozen:
            self.model.before_training(steps)

    def on_epoch(self, epoch: int, epochs: int) -> None:
        """Before each epoch, and before the rest of a resumed one. A method that overrides it calls `super`'s too."""
        self.epoch = epoch

    def before_step(self, step: int) -> None:
        """Before the micro-batches of each optimizer step, counted from 1 over the whole run."""
        self.at_step, self._drawn = step, 0

    def draws(self, purpose: str) -> torch.Generator:
        """A CPU generator for one draw: a function of the run's seed, the optimizer step and how many draws of this
        step came before, so that a resumed run draws as one that was not killed, and all processes draw alike."""
        self._drawn += 1
        return generator(self.objective.seed, purpose, self.at_step, self._drawn)

    def after_step(self, step: int) -> None:
        """After each optimizer step, counted from 1 over the whole run, while its gradients are still there."""
        if not self.model.encoder.is_frozen:
            self.model.after_step(step)
