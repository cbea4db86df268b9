"""`micro_batch_size auto`: finds the largest number of images that fit into memory, once before training."""

import logging
import math

import torch
from accelerate import Accelerator

from tailtune.configs.errors import UserError
from tailtune.configs.machine import local_processes, total_memory
from tailtune.models.backbones.recomputation import StatisticsKept, batch_norms
from tailtune.trainers.memory_estimate import FEW, MANY, blank_batch
from tailtune.trainers.methods.base import Method
from tailtune.trainers.micro_batch_size import divisor
from tailtune.trainers.processes.peak_memory import Peak

log = logging.getLogger("tailtune")

GIB = 2**30
DEFAULT_BUDGET = 20 * GIB
NEVER = 2**63
"""Bytes of a step that does not fit, whatever the budget is."""


def budget_of(memory_budget_gb: float | None, device: torch.device) -> int:
    """Bytes that this process may use on its device.

    Args:
        memory_budget_gb: the option; None: 20 GiB, or all that the device has for this process if that is less.
        device: the device.
    """
    if memory_budget_gb is not None:
        return int(memory_budget_gb * GIB)
    if device.type == "cuda":
        return min(DEFAULT_BUDGET, torch.cuda.get_device_properties(device).total_memory)
    return min(DEFAULT_BUDGET, total_memory() // local_processes())


def largest_micro_batch(
    method: Method, accelerator: Accelerator, size: int, resolution: int, budget: int, later: int = 0
) -> int:
    """The largest divisor of a number of images whose forward and backward pass of blank images fit into a budget.

    Steps of two and of four images tell the memory of one image, and with it the number that should fit. It is then
    tried, and a smaller one after it if it needs more. A system that does not tell the memory of a process can only
    refuse it.

    Args:
        method: the method; running statistics of batch norms stay as they are.
        accelerator: device and processes.
        size: number of images of this process.
        resolution: side of the images, in pixels.
        budget: bytes that this process may use.
        later: bytes that training needs in addition, for the state of the optimizer.

    Returns:
        The number that fits on every process.

    Raises:
        UserError: a single image does not fit.
    """
    device = accelerator.device
    method.train()
    with StatisticsKept(batch_norms(method)):  # those of blank images must not stay
        chosen = _promising(method, device, size, resolution, budget - later)
        while (needed := later + _needed(method, device, chosen, resolution)) > budget:
            if chosen == 1:
                raise UserError(
                    f"not even one image fits into {budget / GIB:.3g} GiB; choose a smaller backbone or resolution, "
                    "prec bf16, grad_checkpoint True, or a larger memory_budget_gb"
                )
            chosen = divisor(size, chosen - 1)
    smallest = int(accelerator.gather(torch.tensor([chosen], device=device)).min())
    measured = f"{needed / GIB:.3g} of {budget / GIB:.3g} GiB" if needed > later else "memory cannot be measured here"
    log.info("micro_batch_size auto: %d images at once (%s)", smallest, measured)
    return smallest


def _promising(method: Method, device: torch.device, size: int, resolution: int, budget: int) -> int:
    """The largest divisor of `size` that should fit, if memory grows with the number of images as from FEW to MANY."""
    if size <= MANY:
        return size
    few, many = (_needed(method, device, count, resolution) for count in (FEW, MANY))
    image = max(1.0, (many - few) / (MANY - FEW))
    return divisor(size, max(1, min(size, FEW + math.floor((budget - few) / image))))


def _needed(method: Method, device: torch.device, size: int, resolution: int) -> int:
    """Bytes of this process in a step of blank images; 0 on a system that does not tell."""
    peak = Peak(device)
    try:
        method(blank_batch(method, device, size, resolution)).loss_sum.backward()
        needed = peak.read() or 0
    except torch.OutOfMemoryError:
        needed = NEVER
    method.zero_grad(set_to_none=True)
    return needed
