"""Distillation: the earlier run is the teacher of this run. RIDE distils six experts into three (Wang et al. 2021)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.configs.option import option
from tailtune.models import ClassificationModel
from tailtune.trainers.losses import present
from tailtune.trainers.methods.base import Batch, Earlier, Method, Objective
from tailtune.trainers.methods.divergence import divergence
from tailtune.trainers.methods.wrapper import Wrapper


@dataclass(frozen=True)
class Options:
    inner: str = option("ride", "Method that the student trains with.", table="METHODS")
    temperature: float = option(1.5, "Temperature of the predictions of teacher and student.")
    weight: float = option(1.0, "Factor on the divergence of the student from the teacher.")
    times_experts: bool = option(
        False, "The whole loss is multiplied by the number of experts, as in the original RIDE code."
    )


class Distill(Wrapper):
    """Loss: inner loss + w T² KL(softmax(z̄_teacher/T) ‖ softmax(z̄/T)), with mean logits z̄ (Hinton et al. 2015).

    The teacher is the run that `after` names. It has the same classes and may have any backbone and number of experts.
    It is in eval mode; in the original its batch norms stay in training mode. Checkpoints of the student do not contain
    the teacher. As in RIDE, the divergence is averaged by the weights of the batch and ignores class weights.
    """

    Options = Options
    depends_on_batch = True
    continues_from_earlier_run = True
    loss_needs_images = True
    starts_where_earlier_run_ended = False

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any, inner: Method) -> None:
        super().__init__(model, objective, options, inner)
        name = self.options.inner
        if self.options.temperature <= 0:
            raise UserError(f"distill.temperature {self.options.temperature} divides logits: it must be above 0")
        if inner.continues_from_earlier_run:
            raise UserError(f"distill.inner {name} continues an earlier run, but `after` names the teacher; try ride")
        self.teacher: tuple[Method, ...] = ()
        """The teacher, in a tuple so that torch does not register it as a submodule; empty before `after` is called."""

    def after(self, earlier: Earlier) -> None:
        self.teacher = (earlier.method(),)

    def fits(self, earlier: Method) -> None:
        """Do nothing: any model can be the teacher."""

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        options, logits = self.options, present(logits, batch["weight"])
        loss_sum, weight = super().loss(logits, batch)
        with torch.no_grad():
            target = self.teacher[0].predict(batch["image"])
        temperature = logits.new_full((), options.temperature)
        teacher_divergence = divergence(self.aggregate(logits), target, batch["weight"], temperature)
        loss_sum = loss_sum + weight * options.weight * teacher_divergence
        return (logits.shape[1] if options.times_experts else 1) * loss_sum, weight
