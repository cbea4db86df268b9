"""Processes and devices of a run: what Accelerate is asked for."""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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

from tailtune.configs import CfgNode
from tailtune.configs.errors import UserError
from tailtune.datasets.data_bundle import Batch
from tailtune.models.backbones.encoder import trained_batch_norms
from tailtune.trainers.precision import PRECISIONS, precision_used

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


PLACES = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
"""What a launcher tells each process of its place, besides where the first one is to be found."""


def world_size() -> int:
    """Processes of this launch, known before Accelerate is asked; `check_environment` has looked at it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launched_alone() -> bool:
    """Whether `accelerate launch` was asked for several processes and started one, as it does without GPUs."""
    return "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ and "WORLD_SIZE" not in os.environ


PATIENCE = timedelta(hours=3)
"""How long processes wait for the first one, which alone computes what is made of all logits."""
LATE = 30.0
"""Seconds after which a process says that it waits for others."""

log = logging.getLogger("tailtune")


@dataclass(frozen=True)
class Devices:
    """What a run asks of its devices and processes."""

    prec: str
    seed: int
    deterministic: bool
    gpu: int | None = None
    """CUDA device of a single process; None: the first."""

    @classmethod
    def of(cls, cfg: CfgNode) -> "Devices":
        return cls(cfg.prec, cfg.seed, cfg.deterministic, cfg.gpu)


def make_accelerator(asked: Devices) -> Accelerator:
    """Devices, processes and loss scaling. Autocast stays off: encoders hold their own arithmetic."""
    cuda = uses_cuda()
    if asked.gpu is not None and cuda and world_size() == 1:
        if asked.gpu >= torch.cuda.device_count():
            raise UserError(f"gpu {asked.gpu}: there are {torch.cuda.device_count()}, counted from 0")
        os.environ["ACCELERATE_TORCH_DEVICE"] = f"cuda:{asked.gpu}"
        torch.cuda.set_device(asked.gpu)  # Accelerate leaves the current device alone then
    AcceleratorState._reset_state()  # the stages of a chain may differ in precision, which it would refuse
    with _said_when_late():
        accelerator = _accelerator(asked.prec, cuda)
    torch.backends.cudnn.deterministic = asked.deterministic
    torch.backends.cudnn.benchmark = not asked.deterministic
    # Dropout draws from the global generators, in each process for images of its own; nothing else of ours does.
    set_seed(asked.seed % 2**31, device_specific=True)
    return accelerator


def _accelerator(prec: str, cuda: bool) -> Accelerator:
    return Accelerator(
        cpu=not cuda,  # without it Accelerate overlooks the other processes of a CPU launch
        gradient_accumulation_steps=1,
        mixed_precision="fp16" if PRECISIONS[precision_used(prec, cuda)].scaled else "no",
        kwargs_handlers=[
            AutocastKwargs(enabled=False),
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )


@contextmanager
def _said_when_late() -> Iterator[None]:
    """Say what is waited for, where the other processes of the launch do not come."""
    count, where = world_size(), ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    text = f"warning: waiting for the other processes of {count} (WORLD_SIZE) at {where}; unset {', '.join(PLACES)} "
    late = threading.Timer(LATE, log.warning, [f"{text}if there are none"])
    late.daemon = True
    if count > 1:
        late.start()
    try:
        yield
    finally:
        late.cancel()


@torch.no_grad()
def share_statistics(accelerator: Accelerator, module: nn.Module) -> None:
    """The mean over processes of the running statistics that each has gathered on its own images.

    Training does not read them, so they may differ until something is saved or evaluated (DDP broadcasts no buffers).
    A run that resumes from a saved state has the same statistics as one that goes on.
    """
    if accelerator.num_processes == 1:
        return
    for norm in trained_batch_norms(module):
        for buffer in norm.buffers():
            if buffer.is_floating_point():
                buffer.copy_(accelerator.reduce(buffer, "mean"))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch; `image` may be a list of images of different sizes."""

    def move(value: Any) -> Any:
        return [move(each) for each in value] if isinstance(value, list) else value.to(device, non_blocking=True)

    return {name: move(value) for name, value in batch.items()}
