"""The micro-batch size: how many images a process computes at once, and the next smaller size if they do not fit."""

import math

from tailtune.configs import CfgNode
from tailtune.configs.errors import UserError


def micro_batch_size(cfg: CfgNode, world: int) -> int:
    """Number of images that one process computes at once. For `auto` this is the start value, its whole share.

    Args:
        cfg: the resolved config.
        world: number of processes.

    Raises:
        UserError: the share of a process is not a multiple of an explicit `micro_batch_size`.
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
    return next(number for number in range(min(size, at_most), 0, -1) if size % number == 0)
