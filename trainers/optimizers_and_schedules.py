"""OPTIMIZERS, SCHEDULES, and `Plan`, the training settings that the training loop reads."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tailtune.configs import CfgNode
from tailtune.configs.errors import UserError, lookup
from tailtune.configs.option import NoOptions, option
from tailtune.configs.value_parsers import as_ints, as_pair
from tailtune.datasets.loading.samplers import SAMPLERS
from tailtune.trainers.weight_decay import DECAY_RULES, Groups

LEAST_FP16 = 2**-24
"""The smallest positive number that fp16 can represent."""


@dataclass(frozen=True)
class Plan:
    """The training settings, read from the config."""

    epochs: int
    max_steps: int | None
    batch_size: int
    micro_batch_size: int
    lr: float
    weight_decay: float
    optimizer: str
    momentum: float
    nesterov: bool
    adam_betas: list[float]
    adam_eps: float
    decay_rule: str | None
    schedule: str
    lr_steps: list[int] | None
    lr_gamma: float
    warmup_epochs: int
    warmup_steps: int
    lr_factors: dict[str, float] | None
    sam: str | None
    sam_rho: float
    sam_rho_late: float | None
    sam_gamma: float
    sam_lambda: float
    gnm_scale: float
    gnm_half_life: int
    sampler: str
    pair_sampler: str | None
    seed: int
    print_freq: int
    save_every: int | None
    num_workers: int | None
    profile_data: bool
    compile: bool

    @classmethod
    def of(cls, cfg: CfgNode, micro_batch_size: int) -> "Plan":
        """Read and check the training settings of a config.

        Args:
            cfg: the resolved config.
            micro_batch_size: number of images that a process computes at once.

        Raises:
            UserError: an unknown optimizer, schedule or sampler, or an option that the chosen one does not read.
        """
        renamed = {"epochs": cfg.num_epochs, "micro_batch_size": micro_batch_size}
        _check(cfg)
        return cls(**renamed, **{name: cfg[name] for name in cls.__dataclass_fields__ if name not in renamed})


def _check(cfg: CfgNode) -> None:
    lookup(SCHEDULES, cfg.schedule, "schedule")
    lookup(SAMPLERS, cfg.sampler, "sampler")
    if cfg.pair_sampler is not None:
        lookup(SAMPLERS, cfg.pair_sampler, "pair_sampler")
    _check_optimizer(cfg)
    if cfg.warmup_steps and cfg.warmup_epochs:
        raise UserError(
            f"warmup_steps {cfg.warmup_steps} and warmup_epochs {cfg.warmup_epochs} are two lengths of one warm-up; "
            "give one of them"
        )
    if cfg.schedule == "multistep" and not cfg.lr_steps:
        raise UserError("schedule multistep needs lr_steps, the epochs that lower lr, such as `lr_steps [160,180]`")


def _check_optimizer(cfg: CfgNode) -> None:
    """Refuse values that are invalid for the chosen optimizer."""
    lookup(OPTIMIZERS, cfg.optimizer, "optimizer")
    if cfg.nesterov and cfg.momentum == 0:
        raise UserError("nesterov True needs momentum above 0, such as 0.9")
    if max(cfg.adam_betas) >= 1:
        raise UserError(f"adam_betas {cfg.adam_betas}: both must be below 1, such as [0.9, 0.999]")
    if cfg.optimizer == "adamw" and cfg.prec == "fp16" and cfg.adam_eps < LEAST_FP16:
        raise UserError(
            f"adam_eps {cfg.adam_eps:g} is 0 in the weights' dtype of prec fp16; choose prec amp or bf16, or a larger "
            "adam_eps such as 1e-4"
        )


def _sgd(groups: Groups, plan: Plan) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        groups, lr=plan.lr, momentum=plan.momentum, weight_decay=plan.weight_decay, nesterov=plan.nesterov
    )


def _adamw(groups: Groups, plan: Plan) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019)."""
    first, second = plan.adam_betas
    return torch.optim.AdamW(
        groups, lr=plan.lr, betas=(first, second), eps=plan.adam_eps, weight_decay=plan.weight_decay
    )


@dataclass(frozen=True)
class SgdOptions:
    """Stochastic gradient descent."""

    momentum: float = option(0.9, "Momentum of optimizer sgd.", key="momentum", least=0.0, most=1.0)
    nesterov: bool = option(False, "Optimizer sgd uses Nesterov's momentum.", key="nesterov")


@dataclass(frozen=True)
class AdamWOptions:
    """Adam with decoupled weight decay."""

    betas: list[float] = option(
        [0.9, 0.999],
        "Decay factors of the two running means of optimizer adamw.",
        as_pair,
        key="adam_betas",
        least=0.0,
        most=1.0,
    )
    eps: float = option(
        1e-8, "Number that optimizer adamw adds to the denominator of its step.", key="adam_eps", least=0.0
    )


@dataclass(frozen=True)
class OptimizerEntry:
    """An entry of OPTIMIZERS."""

    build: Callable[[Groups, Plan], torch.optim.Optimizer]
    Options: type
    """Dataclass of the options that only this optimizer reads."""
    decay_rule: str
    """Entry of DECAY_RULES that is used if the option `decay_rule` is none."""
    copies: int
    """Number of state tensors that the optimizer keeps for each parameter, each of the parameter's size."""


OPTIMIZERS: dict[str, OptimizerEntry] = {
    "sgd": OptimizerEntry(_sgd, SgdOptions, "all", copies=1),
    "adamw": OptimizerEntry(_adamw, AdamWOptions, "matrices", copies=2),
}


def build_optimizer(groups: Groups, plan: Plan) -> torch.optim.Optimizer:
    """The optimizer of a plan.

    Args:
        groups: groups of trainable parameters, as `Method.param_groups` returns them.
        plan: the training settings.

    Raises:
        UserError: `lr_factors` names a group that does not exist.
    """
    check_factors(groups, plan)
    entry = OPTIMIZERS[plan.optimizer]
    return entry.build(DECAY_RULES[plan.decay_rule or entry.decay_rule](groups), plan)


def check_factors(groups: Groups, plan: Plan) -> None:
    """Raise a `UserError` if `lr_factors` names a parameter group that does not exist."""
    by_name = {group["name"]: group for group in groups}
    for name in plan.lr_factors or {}:
        lookup(by_name, name, "parameter group in lr_factors")


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
    """γ^k, where k is the number of `lr_steps` that are at most `epoch`."""
    return plan.lr_gamma ** sum(epoch >= step for step in plan.lr_steps or ())


def cosine(plan: Plan, epoch: int) -> float:
    """½(1 + cos(π e/E)), as in LIFT (Loshchilov & Hutter 2017, eq. 5, without restarts).

    As in BatchFormer, the epoch e and the number of epochs E are counted from the last epoch of the warm-up. That epoch
    has the full learning rate.
    """
    start = max(plan.warmup_epochs - 1, 0)
    return 0.5 * (1 + math.cos(math.pi * max(epoch - start, 0) / max(plan.epochs - start, 1)))


def constant(plan: Plan, epoch: int) -> float:
    """1 in every epoch."""
    return 1.0


@dataclass(frozen=True)
class Schedule:
    """An entry of SCHEDULES."""

    factor: Callable[[Plan, int], float]
    """(plan, epoch, counted from 0) → factor on the learning rate during that epoch."""
    Options: type = NoOptions
    """Dataclass of the options that only this schedule reads."""
    depends_on_length: bool = False
    """Whether the rate of an epoch depends on the number of epochs of the run."""


SCHEDULES: dict[str, Schedule] = {
    "cosine": Schedule(cosine, depends_on_length=True),
    "multistep": Schedule(multistep, MultistepOptions),
    "constant": Schedule(constant),
}


def learning_rate(plan: Plan, epoch: int, step: int) -> float:
    """The learning rate of a parameter group that `lr_factors` does not name.

    A warm-up is linear. It multiplies the schedule by (epoch + 1) / `warmup_epochs` or by step / `warmup_steps`, until
    that factor reaches 1.

    Args:
        plan: the training settings.
        epoch: number of the epoch, counted from 0.
        step: number of the optimizer step, counted from 1 over the whole run.
    """
    warmup = 1.0
    if plan.warmup_epochs:
        warmup = min(1.0, (epoch + 1) / plan.warmup_epochs)
    if plan.warmup_steps:
        warmup = min(1.0, step / plan.warmup_steps)
    return plan.lr * warmup * SCHEDULES[plan.schedule].factor(plan, epoch)


def set_lr(optimizer: torch.optim.Optimizer, plan: Plan, epoch: int, step: int = 1) -> float:
    """Set the learning rate of every parameter group for one step.

    Args:
        optimizer: its groups have names.
        plan: the training settings.
        epoch, step: as in `learning_rate`.

    Returns:
        The learning rate of a group that `lr_factors` does not name.
    """
    lr = learning_rate(plan, epoch, step)
    for group in optimizer.param_groups:
        group["lr"] = lr * (plan.lr_factors or {}).get(group["name"], 1.0)
    return lr
