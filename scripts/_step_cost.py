"""What a training step computes, counted on the meta device: no images, no weights and no GPU are needed."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tailtune.trainers.flat_minima import sam_mode
from tailtune.trainers.memory_estimate import blank_batch
from tailtune.trainers.methods import Method
from tailtune.trainers.methods.base import Batch, Step
from tailtune.trainers.optimizers_and_schedules import Plan
from tailtune.trainers.step_passes import StepPasses

FORMULAS = FlopCounterMode(display=False).flop_registry
"""Operation → FLOPs of a call: convolutions, matrix products and fused attention."""
WITHOUT_KERNEL = {"_unsafe_view", "promote_types"}
WITHOUT_KERNEL |= {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
"""Operations that compute nothing on a device, beside those that return a view."""


@dataclass
class Work:
    """What a device computes."""

    flops: int = 0
    """A multiplication and an addition are two."""
    kernels: int = 0
    """Operations other than views. Each is at least one kernel."""
    moved: int = 0
    """Bytes that operations without FLOPs read and write, such as norms, activations and sums."""


class Counter(TorchDispatchMode):
    """Counts the operations on meta tensors. Those on the CPU, such as random draws, are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        results = [each for each in tree_leaves(result) if isinstance(each, Tensor) and each.is_meta]
        if func.is_view or not results or packet.__name__ in WITHOUT_KERNEL:
            return result
        self.work.kernels += 1
        if packet in FORMULAS:
            self.work.flops += FORMULAS[packet](*args, **(kwargs or {}), out_val=result)
        else:
            given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor) and each.is_meta]
            self.work.moved += sum(map(_bytes, given + results))
        return result


def _bytes(tensor: Tensor) -> int:
    """Bytes that a kernel reads or writes. The numbers of an expanded tensor share bytes."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def work_of_step(method: Method, plan: Plan, resolution: int) -> Work:
    """Forward and backward passes over the first micro-batch of a step, as the trainer makes them.

    Args:
        method: the method on the meta device, as `as_on_a_gpu` returns it.
        plan: the training settings.
        resolution: side of the images, in pixels.
    """
    method.on_epoch(0, plan.epochs)
    method.before_step(1)
    batches = iter([blank_batch(method, torch.device("meta"), plan.micro_batch_size, resolution)])
    passes = StepPasses(Accelerator(cpu=True), method, method, plan.batch_size, 1, batches, _nothing)
    with torch.device("meta"), Counter() as counter:
        sam_mode(plan.sam).gradients(passes, plan, 0)
    method.zero_grad()
    return counter.work


def work_of_texts(method: Method) -> Work:
    """The part of `work_of_step` that encodes the texts of the classes, once for each step while they train."""
    tower = method.model.text
    if tower is None or not tower.trains:
        return Work()
    with torch.device("meta"), Counter() as counter:
        tower.class_features().sum().backward()
    method.zero_grad()
    return counter.work


def _nothing(batch: Batch, outcome: Step) -> Tensor:
    """The trainer counts hits and losses of a micro-batch here."""
    return torch.zeros(1)
