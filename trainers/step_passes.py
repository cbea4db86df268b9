"""`StepPasses`: the forward and backward passes over the micro-batches of one optimizer step."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tailtune.models.backbones.recomputation import StatisticsKept, batch_norms
from tailtune.trainers.methods.base import Batch, Method, Step
from tailtune.trainers.sharding import without_reduction


@dataclass
class StepPasses:
    """The micro-batches of this process in one optimizer step, and the passes over them.

    A pass adds to the gradients of the trained parameters. Gradients are those of the loss sum / `batch_size`, scaled
    as Accelerate scales them, and the mean of this over the processes.
    """

    accelerator: Accelerator
    method: Method
    wrapped: Any
    """The method as Accelerate prepared it. It synchronises the gradients."""
    batch_size: int
    """Number of images in the step, over all processes."""
    size: int
    """Number of micro-batches of this process."""
    incoming: Iterator[Batch]
    """The micro-batches of the step."""
    count: Callable[[Batch, Step], Tensor]
    """→ the sums that the log shows of a micro-batch; called once for each."""
    kept: list[Batch] = field(default_factory=list)
    """The micro-batches that `keeping` has passed on."""

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that train."""
        return [parameter for parameter in self.method.parameters() if parameter.requires_grad]

    def keeping(self) -> Iterator[Batch]:
        """The micro-batches of the step, which are kept on the device for another pass."""
        for batch in self.incoming:
            self.kept.append(batch)
            yield batch

    def counted(self, micro_batches: Iterable[Batch]) -> Tensor:
        """One pass; returns the sums of `count` over the micro-batches."""
        return torch.stack([self.count(batch, outcome) for batch, outcome in self.over(micro_batches)]).sum(0)

    def over(self, micro_batches: Iterable[Batch]) -> Iterator[tuple[Batch, Step]]:
        """One pass; yields each micro-batch and its result after its backward pass."""
        with self.method.model.one_step() as begin_micro_batch:
            for index, batch in enumerate(micro_batches):
                is_local = index < self.size - 1  # gradients are synchronised only in the last micro-batch of a pass
                begin_micro_batch(not is_local)
                with without_reduction(self.accelerator, self.wrapped) if is_local else nullcontext():
                    outcome = self.wrapped(batch)
                    self.backward(outcome.loss_sum)
                yield batch, outcome

    def backward(self, loss_sum: Tensor, **options: Any) -> None:
        """Add the gradients of a loss sum, which a method has returned for one micro-batch."""
        self.accelerator.backward(loss_sum / self.batch_size, **options)

    def synchronise(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """The means over the processes of gradients that passes through `method`, not `wrapped`, have left."""
        if self.accelerator.num_processes == 1:
            return gradients
        return [None if each is None else self.accelerator.reduce(each, "mean") for each in gradients]

    @contextmanager
    def repeatable(self) -> Iterator[None]:
        """A pass whose draws from the global generators (dropout) the following pass repeats."""
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield

    @contextmanager
    def again(self) -> Iterator[None]:
        """A pass over the same micro-batches at other weights.

        The method draws the same random numbers. Batch norms normalise by the images, and their running statistics
        stay as they are, so that they count each image once.
        """
        self.method.before_step(self.method.at_step)
        with StatisticsKept(batch_norms(self.method)):
            yield


def take_gradients(parameters: list[Tensor]) -> list[Tensor | None]:
    """The gradients of parameters, which have none afterwards."""
    taken = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return taken


def put_gradients(parameters: list[Tensor], gradients: list[Tensor | None]) -> None:
    """Set the gradients of parameters, to which a pass then adds."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


@contextmanager
def displaced(parameters: list[Tensor], by: list[Tensor | None]) -> Iterator[None]:
    """Weights θ + ε inside, and exactly θ again afterwards.

    Args:
        parameters: θ.
        by: ε of each parameter; None: 0.
    """
    moves = [(weight, move) for weight, move in zip(parameters, by, strict=True) if move is not None]
    before = [weight.detach().clone() for weight, _ in moves]
    with torch.no_grad():
        for weight, move in moves:
            weight.add_(move)
    try:
        yield
    finally:
        with torch.no_grad():
            for (weight, _), old in zip(moves, before, strict=True):
                weight.copy_(old)
