"""Optimizer, learning-rate schedule, arithmetic and batch sizes: what the loop needs to know in numbers."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from configs import CfgNode
from configs.errors import UserError
from models.host import Host


class Precision(NamedTuple):
    compute: torch.dtype
    """Of the frozen encoder and the activations."""
    trainable: torch.dtype
    scaled: bool
    """With dynamic loss scaling."""


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32, False),
    "bf16": Precision(torch.bfloat16, torch.float32, False),
    "amp": Precision(torch.float16, torch.float32, True),
    "fp16": Precision(torch.float16, torch.float16, False),
    "fp64": Precision(torch.float64, torch.float64, False),
}
RESIDUAL = {None: None, "fp32": torch.float32}


@dataclass(frozen=True)
class Plan:
    """What the loop does, without the how."""

    epochs: int
    max_steps: int | None
    batch_size: int
    micro_batch_size: int
    lr: float
    weight_decay: float
    momentum: float
    seed: int
    print_freq: int
    save_every: int | None
    num_workers: int

    @classmethod
    def of(cls, cfg: CfgNode, micro_batch_size: int) -> "Plan":
        own = {"epochs": cfg.num_epochs, "micro_batch_size": micro_batch_size}
        return cls(**own, **{name: cfg[name] for name in cls.__dataclass_fields__ if name not in own})


def precision_used(prec: str, cuda: bool) -> str:
    """`prec`, or fp32 where half precision needs a GPU."""
    return "fp32" if prec in ("amp", "fp16") and not cuda else prec


def micro_batch_size(cfg: CfgNode, world: int) -> int:
    """Images that one process holds at once; `auto` starts from its whole share.

    Raises:
        UserError: the share of a process is no multiple of an explicit `micro_batch_size`.
    """
    share = math.ceil(cfg.batch_size / world)
    asked = cfg.micro_batch_size
    if asked in (None, "auto") or (asked > share and not cfg.micro_explicit):
        return share
    if share % asked:
        per = f" ({share} of batch_size {cfg.batch_size} for each of {world} processes)" if world > 1 else ""
        raise UserError(
            f"micro_batch_size {asked} does not divide batch_size {share}{per}; try {_divisor(share, asked)}"
        )
    return int(asked)


def halve(size: int) -> int:
    """The largest divisor of `size` that is at most half of it."""
    return _divisor(size, max(1, size // 2))


def _divisor(size: int, at_most: int) -> int:
    return next(each for each in range(min(size, at_most), 0, -1) if size % each == 0)


def build_optimizer(groups: list[dict[str, Any]], plan: Plan) -> torch.optim.SGD:
    """SGD with weight decay on everything that trains, as LIFT."""
    return torch.optim.SGD(groups, lr=plan.lr, momentum=plan.momentum, weight_decay=plan.weight_decay)


def cosine(epoch: int, epochs: int) -> float:
    """½(1 + cos(π e/E)), constant within an epoch, as LIFT (Loshchilov & Hutter 2017, eq. 5, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def set_lr(optimizer: torch.optim.Optimizer, plan: Plan, epoch: int) -> float:
    """Give every group the learning rate of an epoch; returns it."""
    lr = plan.lr * cosine(epoch, plan.epochs)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def cast_trainable(module: nn.Module, dtype: torch.dtype) -> None:
    """What trains into the dtype of its precision, and what peft multiplies it with."""
    trains = [each for each in module.parameters() if each.requires_grad]
    adapted = (layer for host in module.modules() if isinstance(host, Host) for layer in host.adapted)
    frozen = [each for layer in adapted for each in layer.buffers() if each.is_floating_point()]
    for each in trains + frozen:
        each.data = each.data.to(dtype)
