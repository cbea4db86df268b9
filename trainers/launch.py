"""Processes and devices of a run: what Accelerate is asked for."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    set_seed,
)
from torch import nn

from configs import CfgNode
from configs.errors import UserError
from models.host import batch_norms
from trainers.methods.base import Batch
from trainers.optim import PRECISIONS, precision_used

Decision = TypeVar("Decision")


def on_main(accelerator: Accelerator, decide: Callable[[], Decision]) -> Decision:
    """What the first process decides, on all of them; a `UserError` too, so that none is left waiting."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = decide()
        except UserError as error:
            outcome[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def uses_cuda() -> bool:
    """Whether this run computes on a GPU; `accelerate launch --cpu` says no where there is one."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("true", "1")


def world_size() -> int:
    """Processes of this launch, known before Accelerate is asked."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launched_alone() -> bool:
    """Whether `accelerate launch` was asked for several processes and started one, as it does without GPUs."""
    return "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ and "WORLD_SIZE" not in os.environ


PATIENCE = timedelta(hours=3)
"""How long processes wait for the first one, which alone computes what is made of all logits."""


def make_accelerator(cfg: CfgNode) -> Accelerator:
    """Devices, processes and loss scaling. Autocast stays off: encoders hold their own arithmetic."""
    cuda = uses_cuda()
    if cfg.gpu is not None and cuda and world_size() == 1:
        if cfg.gpu >= torch.cuda.device_count():
            raise UserError(f"gpu {cfg.gpu}: there are {torch.cuda.device_count()}, counted from 0")
        os.environ["ACCELERATE_TORCH_DEVICE"] = f"cuda:{cfg.gpu}"
        torch.cuda.set_device(cfg.gpu)  # Accelerate leaves the current device alone then
    AcceleratorState._reset_state()  # the stages of a chain may differ in precision, which it would refuse
    accelerator = Accelerator(
        cpu=not cuda,  # without it Accelerate overlooks the other processes of a CPU launch
        gradient_accumulation_steps=1,
        mixed_precision="fp16" if PRECISIONS[precision_used(cfg.prec, cuda)].scaled else "no",
        kwargs_handlers=[
            AutocastKwargs(enabled=False),
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    torch.backends.cudnn.deterministic = cfg.deterministic
    torch.backends.cudnn.benchmark = not cfg.deterministic
    # Dropout draws from the global generators, in each process for images of its own; nothing else of ours does.
    set_seed(cfg.seed % 2**31, device_specific=True)
    return accelerator


@torch.no_grad()
def share_statistics(accelerator: Accelerator, module: nn.Module) -> None:
    """The mean over processes of the running statistics that each has gathered on its own images.

    Training does not read them, so they may differ until something is saved or evaluated (DDP broadcasts no buffers).
    Whoever resumes from what is saved then has what whoever goes on has.
    """
    if accelerator.num_processes == 1:
        return
    for norm in batch_norms(module):
        for buffer in norm.buffers():
            if buffer.is_floating_point():
                buffer.copy_(accelerator.reduce(buffer, "mean"))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch; `image` may be a list of images of different sizes."""

    def move(value: Any) -> Any:
        return [move(each) for each in value] if isinstance(value, list) else value.to(device, non_blocking=True)

    return {name: move(value) for name, value in batch.items()}
