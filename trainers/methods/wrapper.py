"""Base class of methods that add something to another method and share its model and loss."""

from typing import Any

from torch import Tensor

from tailtune.models import ClassificationModel
from tailtune.trainers.methods.base import Batch, Earlier, Method, Objective


class Wrapper(Method):
    """Base class of methods that wrap an inner method, which their option `inner` names.

    The wrapper and the inner method share one model. The weights of the model have the same names with and without a
    wrapper, so that a run with a wrapper can continue a run without one, and the reverse.
    """

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any, inner: Method) -> None:
        super().__init__(model, objective, options)
        self.inner = inner
        self.frozen_trained = {name if name.startswith("model.") else f"inner.{name}" for name in inner.frozen_trained}
        self.continues_from_earlier_run = self.continues_from_earlier_run or inner.continues_from_earlier_run
        self.changes_start = inner.changes_start

    @property
    def changes_head_logits(self) -> bool:
        return self.inner.changes_head_logits

    @property
    def loss_needs_images(self) -> bool:
        return self.inner.loss_needs_images

    @property
    def starts_where_earlier_run_ended(self) -> bool:
        return not self.inner.continues_from_earlier_run or self.inner.starts_where_earlier_run_ended

    def discards(self, name: str) -> bool:
        return self.inner.continues_from_earlier_run and self.inner.discards(name)

    @property
    def batch_coupled(self) -> bool:
        return super().batch_coupled or self.inner.batch_coupled

    @property
    def adds_up_samples(self) -> bool:
        return super().adds_up_samples and self.inner.adds_up_samples

    def head_logits(self, features: Tensor) -> Tensor:
        return self.inner.head_logits(features)

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.inner.loss(logits, batch)

    def aggregate(self, logits: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.inner.aggregate(logits, weights)

    def assumed_prior(self) -> Tensor:
        return self.inner.assumed_prior()

    def after(self, earlier: Earlier) -> None:
        if self.inner.continues_from_earlier_run:
            self.inner.after(earlier)
        else:
            super().after(earlier)

    def fits(self, earlier: Method) -> None:
        if self.inner.continues_from_earlier_run:
            self.inner.fits(earlier)
        else:
            super().fits(earlier)

    @property
    def depends_on_length(self) -> bool:
        return self.inner.depends_on_length

    def on_epoch(self, epoch: int, epochs: int) -> None:
        super().on_epoch(epoch, epochs)
        self.inner.on_epoch(epoch, epochs)

    def before_training(self, steps: int, per_epoch: int) -> None:
        self.inner.before_training(steps, per_epoch)

    def before_step(self, step: int) -> None:
        super().before_step(step)
        self.inner.before_step(step)

    def after_step(self, step: int) -> None:
        self.inner.after_step(step)
