"""The micro-batch size: how many images a process computes at once."""

import math

from tailtune.configs import CfgNode
from tailtune.configs.errors import UserError


def micro_batch_size(cfg: CfgNode, world: int) -> int:
    """Number of images that one process computes at once. For `auto` this is the start value, its whole share.

    Args:
        cfg: the resolved config.
        world: number of processes.

    Raises:
        UserError: the share of a process is not a multiple of an explicit `micro_batch_size`, or `memory_budget_gb` is
            set and nothing reads it.
    """
    share = math.ceil(cfg.batch_size / world)
    asked = cfg.micro_batch_size
    if asked != "auto" and cfg.memory_budget_gb is not None:
        raise UserError("memory_budget_gb: only `micro_batch_size auto` reads it; set that, or leave it out")
    if asked in (None, "auto") or (asked > share and not cfg.micro_explicit):
        return share
    if share % asked:
        per = f" ({share} of batch_size {cfg.batch_size} for each of {world} processes)" if world > 1 else ""
        raise UserError(
            f"micro_batch_size {asked} does not divide batch_size {share}{per}; try {divisor(share, asked)}"
        )
    return int(asked)


def divisor(size: int, at_most: int) -> int:
    """The largest divisor of `size` that is at most so large."""
    return next(number for number in range(min(size, at_most), 0, -1) if size % number == 0)
