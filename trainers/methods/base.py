"""`Method`, the base class of training methods: a module that holds model and objective, and that Accelerate wraps."""

from typing import Any

import torch
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.configs.seeding import generator
from tailtune.models import ClassificationModel
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.staged_module import StagedModule
from tailtune.models.heads.head_init import HeadContext
from tailtune.trainers.losses import Prior, effective_weights, log_prior
from tailtune.trainers.methods.earlier import Earlier
from tailtune.trainers.methods.objective import Batch, NoOptions, Objective, Step, combine
from tailtune.trainers.storage.checkpoint import trained_state

__all__ = ["Batch", "Earlier", "Method", "NoOptions", "Objective", "Step", "combine"]


class Method(StagedModule):
    """Base class of all methods. By itself it trains a classifier with one loss on the mean of the experts' logits.

    A new method usually overrides `loss`, which gets the experts' logits. A method whose loss needs more than logits
    overrides `forward`. Other code reads the properties below and never tests for a class; a subclass overrides them
    by a property or a class attribute.

    Class attributes, of which some are read before a model is built:
        Options: dataclass; its fields are the options `<method>.<field>`, with their texts in `metadata["doc"]`.
        depends_on_batch: whether the loss of an image depends on the other images of its micro-batch.
        continues_from_earlier_run: whether the method needs a finished run, which `after` names.
        trains_new_head: whether it trains a classifier of its own, beside that of the model or in its place.
        changes_start: whether it changes what it takes over from the earlier run before the first step.
    """

    Options: type = NoOptions
    depends_on_batch: bool = False
    continues_from_earlier_run: bool = False
    trains_new_head: bool = False
    changes_start: bool = False
    log_prior: Tensor
    class_counts: Tensor

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any = None) -> None:
        super().__init__()
        self.model, self.objective, self.options = model, objective, options
        self.epoch = self._drawn = 0
        self.at_step = 0  # the optimizer step, counted from 1 over the whole run
        self.register_buffer("log_prior", log_prior(objective.class_counts), persistent=False)
        self.register_buffer("class_counts", objective.class_counts, persistent=False)

    @property
    def asks_every_expert(self) -> bool:
        """Whether every expert computes every image. If not, `expert_logits` holds NaN for skipped experts."""
        return True

    @property
    def changes_head_logits(self) -> bool:
        """Whether `head_logits` changes the logits of the heads."""
        return False

    @property
    def loss_needs_images(self) -> bool:
        """Whether `loss` reads the images of the batch in addition to their logits."""
        return False

    @property
    def takes_image_pairs(self) -> bool:
        """Whether a batch needs a second image for each image, `partner`, which `pair_sampler` chooses."""
        return False

    @property
    def takes_two_views(self) -> bool:
        """Whether a batch needs a second augmentation of each image: `other_image`, and `other_partner` in pairs."""
        return False

    @property
    def can_be_wrapped(self) -> bool:
        """Whether `loss`, `head_logits` and `aggregate` define the method, so that a `Wrapper` may run the model.

        This must be False in a method that overrides `forward` or `expert_logits`.
        """
        return True

    @property
    def takes_features(self) -> bool:
        """Whether a batch may have features in the place of images, because only `model.features` reads the images."""
        return self.can_be_wrapped and not self.loss_needs_images

    @property
    def parts(self) -> "tuple[Method, ...]":
        """The methods that read the images. If there are several, a batch may have a list of what each one takes."""
        return (self,)

    @property
    def starts_where_earlier_run_ended(self) -> bool:
        """Whether the weights of the run that `after` names are the initial weights; False if that run is a teacher."""
        return True

    def discards(self, name: str) -> bool:
        """Whether this method does not take over the tensor `name`, which the earlier run has trained."""
        return False

    @property
    def predicts_as_earlier_run(self) -> bool:
        """Whether the logits equal those of the earlier run, because this run trains other parts only."""
        return False

    @property
    def batch_coupled(self) -> bool:
        """Whether the objective depends on the micro-batch size, because of the method, its loss or its model."""
        return self.depends_on_batch or self.objective.loss.couples or self.model.batch_coupled

    @property
    def adds_up_samples(self) -> bool:
        """Whether the loss is a sum over samples, in which the weight of a sample is a factor on its term."""
        return not (self.depends_on_batch or self.objective.loss.couples)

    @property
    def depends_on_length(self) -> bool:
        """Whether a step depends on the number of epochs of the run, so that a finished run cannot get more of them."""
        return self.model.depends_on_length

    @property
    def prior(self) -> Prior:
        """The training distribution, for the loss."""
        return Prior(self.log_prior, self.class_counts, self.draws)

    def forward(self, batch: Batch) -> Step:
        self.model.choose_classes(batch["label"], self.draws)
        return self.judged(self.expert_logits(batch["image"]), batch)

    def judged(self, logits: Tensor, batch: Batch) -> Step:
        """The result of `forward`, for expert logits [B, E, C] whose loss is that of `loss`."""
        shared = {**batch, "weight": batch["weight"] * batch["share"]} if "share" in batch else None
        part = None if shared is None else self.loss(logits, shared)[0]
        return self.step(*self.loss(logits, batch), logits)._replace(shared_sum=part)

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Expert logits [B, E, C] → (weighted sum of the samples' losses, sum of the weights), both scalars."""
        return self.loss_of(self.aggregate(logits), batch)

    def loss_of(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The configured loss of one classifier's logits [B, C]; returns the same two sums as `loss`."""
        return self.objective.loss(logits, batch["label"], self.sample_weights(batch), self.prior)

    def loss_of_each(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sum over experts of the configured loss of each expert's logits [B, E, C]; the weight of one expert."""
        terms = [self.loss_of(expert_logits, batch) for expert_logits in logits.unbind(1)]
        return torch.stack([loss_sum for loss_sum, _ in terms]).sum(), terms[0][1]

    def step(self, loss_sum: Tensor, weight: Tensor, logits: Tensor) -> Step:
        """The result of `forward`, for expert logits [B, E, C]. It adds the penalty of the tuners to the loss."""
        if (penalty := self.model.penalty()) is not None:  # of the mean loss: the trainer divides by the weight
            loss_sum = loss_sum + weight * penalty
        return Step(loss_sum, weight, self.aggregate(logits))

    @property
    def deferred(self) -> bool:
        """Whether the current epoch is `drw_epoch` or a later one."""
        return self.objective.drw_epoch is not None and self.epoch >= self.objective.drw_epoch

    def sample_weights(self, batch: Batch) -> Tensor:
        """Weight of each sample in the loss [B]: its weight in the batch, times its class weight from `drw_epoch` on.

        This is deferred re-weighting (Cao et al. 2019), for any loss. A method that overrides `forward` must use these
        weights. The weights in the batch are not changed, because the trainer counts the images by them.
        """
        weights: Tensor = batch["weight"]
        if not self.deferred:
            return weights
        return weights * effective_weights(self.class_counts.double()).to(weights.dtype)[batch["label"]]

    def head_logits(self, features: Tensor) -> Tensor:
        """Features [B, D] or [B, E, D] → logits of each expert [B, E, C], whose mean is the prediction."""
        return self.model.logits(features)

    def expert_logits(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] → logits of each expert [B, E, C]."""
        return self.head_logits(self.model.features(images))

    def aggregate(self, logits: Tensor, weights: Tensor | None = None) -> Tensor:
        """Combine expert logits: [B, E, C] → [B, C], the sum with weights [E], or the mean without weights."""
        return combine(logits, weights)

    def predict(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] → logits [B, C]."""
        return self.aggregate(self.expert_logits(images))

    def assumed_prior(self) -> Tensor:
        """log p [E, C] in fp64: the class prior for which softmax of each expert's logits is the correct posterior.

        Logits for another prior q are z + log q − log p. A method that changes logits before the loss overrides this.
        """
        return self.objective.assumed().expand(self.model.num_experts, -1)

    def counts(self) -> dict[str, int]:
        """Numbers of parameters. Parameters of the method outside the model are counted as parameters of tuners."""
        of_model, counts = {id(parameter) for parameter in self.model.parameters()}, self.model.counts()
        rest = [parameter for parameter in self.parameters() if id(parameter) not in of_model]
        trains = sum(parameter.numel() for parameter in rest if parameter.requires_grad)
        more = {"total": sum(parameter.numel() for parameter in rest), "tuner": trains, "trainable": trains}
        return {name: count + more.get(name, 0) for name, count in counts.items()}

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of the trainable parameters. Their order must be stable: a saved optimizer state relies on it."""
        head = {id(parameter) for parameter in self.model.head.parameters()}
        trains = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = {
            "tuner": [parameter for parameter in trains if id(parameter) not in head],
            "head": [parameter for parameter in trains if id(parameter) in head],
        }
        return [{"name": name, "params": params} for name, params in groups.items() if params]

    def prepare(self, context: HeadContext) -> None:
        """Initialise the head. Called once, before the first step of a fresh run."""
        self.model.init_head(context)

    def after(self, earlier: Earlier) -> None:
        """Take over what is needed of the run that `after` names. Called in each launch that trains, before a step."""
        if earlier.fresh:
            self.start_from(earlier.tensors())

    def freeze_trained(self, *parts: nn.Module, batch_norms_follow: bool = False) -> None:
        """Freeze the trainable parameters in parts of this method. A checkpoint still contains them.

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
        """Copy the tensors that an earlier run trained, by name, into this method.

        Raises:
            UserError: as in `taken_over`.
        """
        state = trained_state(self)
        with torch.no_grad():
            for name, tensor in self.taken_over(tensors).items():
                state[name].copy_(tensor)

    def fits(self, earlier: "Method") -> None:
        """Raise a `UserError` if this run cannot continue the run of the method `earlier`, which may be untrained."""
        self.taken_over(trained_state(earlier))

    def taken_over(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that an earlier run trained, by name, without those that this method `discards`.

        Raises:
            UserError: this run does not train such a tensor, or it keeps a tensor that the earlier run did not train.
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
        """Called before the first step of a launch, also a resumed one. A run has `steps`, a full epoch `per_epoch`."""
        if not self.model.encoder.is_frozen:
            self.model.before_training(steps)

    def on_epoch(self, epoch: int, epochs: int) -> None:
        """Called before each epoch, and when an epoch is resumed. An override must call the method of `super()`."""
        self.epoch = epoch

    def before_step(self, step: int) -> None:
        """Called before the micro-batches of each optimizer step, which is counted from 1 over the whole run."""
        self.at_step, self._drawn = step, 0

    def draws(self, purpose: str) -> torch.Generator:
        """A CPU generator for one random draw. It depends on the run's seed, the purpose, the optimizer step and the
        number of earlier draws in that step. A resumed run and all processes therefore draw the same numbers."""
        self._drawn += 1
        return generator(self.objective.seed, purpose, self.at_step, self._drawn)

    def after_step(self, step: int) -> None:
        """Called after each optimizer step, counted from 1 over the whole run, before its gradients are cleared."""
        if not self.model.encoder.is_frozen:
            self.model.after_step(step)
