"""Checks the environment in which a command is started: the working directory and the variables of a launcher."""

import os
import sys
from collections.abc import Mapping

from tailtune.configs.errors import UserError, printable

NUMERIC_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
UNSUPPORTED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
"""Variable that `accelerate launch` sets → the library that it asks for."""
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""A launcher sets all of these for each process."""


def world_size() -> int:
    """Number of processes of this launch, from the environment; `check_environment` has checked the variable."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_on(name: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a variable of `accelerate launch` is set to true."""
    return environment.get(name, "false").lower() in ("true", "1")


def is_first_process() -> bool:
    """Whether this is the first process of this launch, which alone shows progress bars."""
    return int(os.environ.get("RANK", 0)) == 0


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Check what a command is started in: the encoding of file names, the folder, and the variables of a launcher.

    Args:
        environment: name of an environment variable → value.

    Raises:
        UserError: file names are not read as UTF-8, the working directory has been deleted, the launch asks for
            DeepSpeed or Megatron-LM, a launcher's variable is not a number, or only some of the launcher's variables
            are set.
    """
    if (encoding := sys.getfilesystemencoding()) != "utf-8":  # paths in lists and YAML files would name other files
        raise UserError(f"Python reads file names as {encoding} here, and not as UTF-8: set PYTHONUTF8=1")
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the working directory has been deleted: change to a folder that exists") from None
    for name, library in UNSUPPORTED.items():
        if is_on(name, environment):
            raise UserError(
                f"{library} is not supported ({name}): shard with FSDP instead, `accelerate launch --use_fsdp "
                "--fsdp_version 2 …`"
            )
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
