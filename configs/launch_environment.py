"""Checks the environment in which a command is started: the working directory and the variables of a launcher."""

import os
from collections.abc import Mapping

from tailtune.configs.errors import UserError, printable

NUMERIC_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""A launcher sets all of these for each process."""


def world_size() -> int:
    """Number of processes of this launch, from the environment; `check_environment` has checked the variable."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first_process() -> bool:
    """Whether this is the first process of this launch, which alone shows progress bars."""
    return int(os.environ.get("RANK", 0)) == 0


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Check that variables of another program do not look like a launch of several processes.

    Args:
        environment: name of an environment variable → value.

    Raises:
        UserError: the working directory has been deleted, a launcher's variable is not a number, or only some of the
            launcher's variables are set.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the working directory has been deleted: change to a folder that exists") from None
    for name in NUMERIC_VARIABLES:
        if name in environment and not (environment[name].isascii() and environment[name].isdigit()):
            raise UserError(
                f"the environment variable {name} is '{printable(environment[name])}', which is no number: "
                f"`unset {name}`"
            )
    rank, world = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    if rank >= max(world, 1) or world < 1:
        size = environment.get("WORLD_SIZE", "unset")
        raise UserError(
            f"the environment has RANK {rank} and WORLD_SIZE {size}, which do not fit together: `unset RANK "
            "WORLD_SIZE`, or start several processes with accelerate launch"
        )
    missing = [name for name in LAUNCHER_VARIABLES if name not in environment]
    if missing and (world > 1 or "LOCAL_RANK" in environment):
        present = next(name for name in ("WORLD_SIZE", "LOCAL_RANK") if name in environment)
        raise UserError(
            f"the environment has {present} {environment[present]} but no {', '.join(missing)}: `unset RANK "
            "WORLD_SIZE LOCAL_RANK`, or start several processes with accelerate launch, which sets all of them"
        )
