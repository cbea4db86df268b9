"""Processes and devices of a run: what Accelerate is asked for."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs, broadcast_object_list, set_seed

from configs import CfgNode
from configs.errors import UserError
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


def launched_alone() -> bool:
    """Whether `accelerate launch` was asked for several processes and started one, as it does without GPUs."""
    return "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ and "WORLD_SIZE" not in os.environ


def make_accelerator(cfg: CfgNode) -> Accelerator:
    """Devices, processes and loss scaling. Autocast stays off: encoders hold their own arithmetic."""
    if cfg.gpu is not None and torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        if cfg.gpu >= torch.cuda.device_count():
            raise UserError(f"gpu {cfg.gpu}: there are {torch.cuda.device_count()}, counted from 0")
        os.environ["ACCELERATE_TORCH_DEVICE"] = f"cuda:{cfg.gpu}"
    scaled = PRECISIONS[precision_used(cfg.prec, torch.cuda.is_available())].scaled
    handlers = [AutocastKwargs(enabled=False), DistributedDataParallelKwargs(broadcast_buffers=False)]
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # without it Accelerate overlooks the other processes of a CPU launch
        gradient_accumulation_steps=1,
        mixed_precision="fp16" if scaled else "no",
        kwargs_handlers=handlers,
    )
    torch.backends.cudnn.deterministic = cfg.deterministic
    torch.backends.cudnn.benchmark = not cfg.deterministic
    set_seed(cfg.seed % 2**32)  # nothing of ours draws from the global generators; a library may
    return accelerator


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch; `image` may be a list of images of different sizes."""

    def move(value: Any) -> Any:
        return [move(each) for each in value] if isinstance(value, list) else value.to(device, non_blocking=True)

    return {name: move(value) for name, value in batch.items()}
