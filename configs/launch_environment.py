"""What a command is started in, checked before anything relies on it: the working directory, a launcher's variables."""

import os
from collections.abc import Mapping

from tailtune.configs.errors import UserError, shown

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets for each process, all of it."""


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to start where another program's leftovers would be taken for a launch of several processes.

    Raises:
        UserError: the working directory is gone; a launcher's variable is no number, or stands there without the rest.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the working directory has been deleted: change into one that exists") from None
    for name in NUMBERS:
        if name in environment and not (environment[name].isascii() and environment[name].isdigit()):
            raise UserError(
                f"the environment has {name} '{shown(environment[name])}', which is no number: `unset {name}`"
            )
    rank, world = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    if rank >= max(world, 1) or world < 1:
        size = environment.get("WORLD_SIZE", "unset")
        raise UserError(
            f"the environment has RANK {rank} and WORLD_SIZE {size}, which is no launch: `unset RANK WORLD_SIZE`, "
            "or start several processes with accelerate launch"
        )
    missing = [name for name in LAUNCHED if name not in environment]
    if missing and (world > 1 or "LOCAL_RANK" in environment):
        there = next(name for name in ("WORLD_SIZE", "LOCAL_RANK") if name in environment)
        raise UserError(
            f"the environment has {there} {environment[there]} but no {', '.join(missing)}: `unset RANK WORLD_SIZE "
            "LOCAL_RANK`, or start several processes with accelerate launch, which sets them all"
        )
