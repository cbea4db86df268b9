"""How much memory training takes, from the outline of a run: on the meta device, without images, weights or a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tailtune.models.backbones.whole_network_encoder import WholeNetworkEncoder
from tailtune.trainers.methods import Method
from tailtune.trainers.precision import PRECISIONS, cast_trainable

FEW, MANY = 2, 4
"""Images of two steps. Their difference is what images add."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that one process holds. The workspace of single kernels and of the allocator comes on top."""

    parameters: int
    gradients: int
    optimizer: int
    """State of the optimizer."""
    image: int | None
    """Activations that the backward pass needs of one image; None where they cannot be counted without numbers."""

    def total(self, micro_batch_size: int) -> int:
        """All of them, with so many images at once."""
        return self.parameters + self.gradients + self.optimizer + (self.image or 0) * micro_batch_size


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps: unique storages, weights and buffers left out."""

    def __init__(self, module: nn.Module) -> None:
        known = {_storage(tensor) for tensor in [*module.parameters(), *module.buffers()]}
        self.kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            if _storage(tensor) not in known:
                self.kept[_storage(tensor)] = tensor.untyped_storage()
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.kept.values())


def _storage(tensor: Tensor) -> int:
    """What tells storages apart where they have no addresses."""
    return int(tensor.untyped_storage()._cdata)


def as_on_a_gpu(method: Method, prec: str, residual: torch.dtype | None) -> Method:
    """A method on the meta device, in the arithmetic of training on a GPU.

    Autocast does not know the meta device. So a network that runs as a whole is counted in fp32, which is more.
    """
    precision = PRECISIONS["fp32" if isinstance(method.model.encoder, WholeNetworkEncoder) else prec]
    with torch.device("meta"):
        method.to("meta")
        method.model.set_precision(precision.compute, residual)
        cast_trainable(method, precision.trainable)
    return method.train()


def training_memory(method: Method, resolution: int, copies: int, beside: Sequence[nn.Module] = ()) -> TrainingMemory:
    """The memory of training a method that lies on the meta device in the arithmetic of training.

    Args:
        resolution: side of the images, in pixels.
        copies: numbers that the optimizer keeps for each weight.
        beside: modules that the method keeps outside itself, such as a teacher.
    """
    weights = [weight for module in (method, *beside) for weight in module.parameters()]
    trained = 4 * sum(weight.numel() for weight in method.parameters() if weight.requires_grad)
    parameters = sum(weight.numel() * weight.element_size() for weight in weights)
    return TrainingMemory(parameters, trained, copies * trained, _of_image(method, resolution) if trained else 0)


def _of_image(method: Method, resolution: int) -> int | None:
    try:
        few, many = (saved(method, resolution, count) for count in (FEW, MANY))
    except (NotImplementedError, AssertionError, RuntimeError):  # what depends on numbers, such as some tuners of peft
        return None
    return (many - few) // (MANY - FEW)


def saved(method: Method, resolution: int, count: int) -> int:
    """Bytes that a step of so many images keeps for its backward pass."""
    keeps = SavedBytes(method)
    with torch.device("meta"):
        batch: dict[str, Any] = {name: torch.empty(count, dtype=torch.int64) for name in ("label", "index")}
        batch["image"] = batch["partner"] = torch.empty(count, 3, resolution, resolution, dtype=torch.uint8)
        batch["weight"] = torch.empty(count)
        with keeps:
            step = method(batch)
    assert step.loss_sum.requires_grad
    return keeps.total
