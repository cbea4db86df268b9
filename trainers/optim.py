"""Optimizer, learning-rate schedule and batch sizes: what the loop needs to know in numbers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tailtune.configs import CfgNode
from tailtune.configs.errors import UserError, lookup
from tailtune.configs.option import NoOptions, key_names, option
from tailtune.configs.value_parsers import as_ints
from tailtune.datasets.loading.samplers import SAMPLERS


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
    nesterov: bool
    schedule: str
    lr_steps: list[int] | None
    lr_gamma: float
    warmup_epochs: int
    lr_factors: dict[str, float] | None
    sampler: str
    pair_sampler: str | None
    seed: int
    print_freq: int
    save_every: int | None
    num_workers: int

    @classmethod
    def of(cls, cfg: CfgNode, micro_batch_size: int) -> "Plan":
        """The numbers of a config.

        Raises:
            UserError: no such schedule or sampler, or an option beside them that would do nothing.
        """
        own = {"epochs": cfg.num_epochs, "micro_batch_size": micro_batch_size}
        _check(cfg)
        return cls(**own, **{name: cfg[name] for name in cls.__dataclass_fields__ if name not in own})


def _check(cfg: CfgNode) -> None:
    lookup(SCHEDULES, cfg.schedule, "schedule")
    lookup(SAMPLERS, cfg.sampler, "sampler")
    if cfg.pair_sampler is not None:
        lookup(SAMPLERS, cfg.pair_sampler, "pair_sampler")
    if cfg.nesterov and cfg.momentum == 0:
        raise UserError("nesterov True needs momentum above 0, such as 0.9")
    if cfg.schedule == "multistep" and not cfg.lr_steps:
        raise UserError("schedule multistep needs lr_steps, the epochs that lower lr, such as `lr_steps [160,180]`")
    for name, schedule in ((name, schedule) for name, schedule in SCHEDULES.items() if name != cfg.schedule):
        for field, key in key_names(schedule.Options, name).items():
            usual = getattr(schedule.Options(), field)
            if cfg[key] != usual:
                raise UserError(
                    f"{key} {cfg[key]} is of schedule {name} and does nothing in schedule {cfg.schedule}; "
                    f"add `{key} {'none' if usual is None else usual}`, or choose {name}"
                )


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
    """SGD with weight decay on everything that trains, as LIFT.

    Raises:
        UserError: `lr_factors` names a group that there is not.
    """
    check_factors(groups, plan)
    return torch.optim.SGD(
        groups, lr=plan.lr, momentum=plan.momentum, weight_decay=plan.weight_decay, nesterov=plan.nesterov
    )


def check_factors(groups: list[dict[str, Any]], plan: Plan) -> None:
    """Raise a `UserError` if `lr_factors` names what is no group."""
    there = {group["name"]: group for group in groups}
    for name in plan.lr_factors or {}:
        lookup(there, name, "parameter group in lr_factors")


@dataclass(frozen=True)
class MultistepOptions:
    """Steps of the learning rate."""

    lr_steps: list[int] | None = option(
        None,
        "Epochs (the first is 0) at which schedule multistep multiplies the learning rate by `lr_gamma`.",
        as_ints,
        key="lr_steps",
        most=10**6,
    )
    lr_gamma: float = option(
        0.1, "Factor on the learning rate at each of `lr_steps`, in schedule multistep.", key="lr_gamma", least=0.0
    )


def multistep(plan: Plan, epoch: int) -> float:
    """γ to the number of `lr_steps` that have come."""
    return plan.lr_gamma ** sum(epoch >= step for step in plan.lr_steps or ())


def cosine(plan: Plan, epoch: int) -> float:
    """½(1 + cos(π e/E)), as LIFT (Loshchilov & Hutter 2017, eq. 5, without restarts).

    Both are counted from the last epoch of the warm-up, which has the full rate, as BatchFormer does.
    """
    start = max(plan.warmup_epochs - 1, 0)
    return 0.5 * (1 + math.cos(math.pi * max(epoch - start, 0) / max(plan.epochs - start, 1)))


def constant(plan: Plan, epoch: int) -> float:
    return 1.0


@dataclass(frozen=True)
class Schedule:
    """An entry of SCHEDULES."""

    factor: Callable[[Plan, int], float]
    """Plan, epoch (the first is 0) → factor on the learning rate, constant within an epoch."""
    Options: type = NoOptions
    """Dataclass of its options."""


SCHEDULES: dict[str, Schedule] = {
    "cosine": Schedule(cosine),
    "multistep": Schedule(multistep, MultistepOptions),
    "constant": Schedule(constant),
}


def set_lr(optimizer: torch.optim.Optimizer, plan: Plan, epoch: int) -> float:
    """Give every group its learning rate of an epoch; returns that of a group without a factor of its own."""
    rising = min(1.0, (epoch + 1) / plan.warmup_epochs) if plan.warmup_epochs else 1.0
    lr = plan.lr * rising * SCHEDULES[plan.schedule].factor(plan, epoch)
    for group in optimizer.param_groups:
        group["lr"] = lr * (plan.lr_factors or {}).get(group["name"], 1.0)
    return lr
