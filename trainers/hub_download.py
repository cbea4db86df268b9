"""Finds a shared run: on this machine, or in a repository of the Hugging Face Hub."""

import re
from pathlib import Path

from tailtune.configs.errors import UserError, printable
from tailtune.configs.lazy_module import lazy_module
from tailtune.trainers.export.hub_format import RUN_FILES
from tailtune.trainers.runs.run_folder import OUTPUT

hub = lazy_module("huggingface_hub")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def local_run(name: str) -> str | Path:
    """The folder of a run. If `name` is the name of a repository, its files are downloaded into the Hub's cache.

    A folder on this machine comes first. So does a path that begins with a folder on this machine: `output/rnu` is a
    typing error, and nothing is asked for on the Hub.

    Args:
        name: path of a folder, its name in output/, or USER/NAME.

    Returns:
        `name` itself, or the folder in the cache.

    Raises:
        UserError: the repository does not exist, has no run of TailTune, or cannot be reached.
    """
    path = Path(name).expanduser()
    here = (path, OUTPUT / name, path.parent)
    if any(place.exists() for place in here) or path.parent == OUTPUT or not REPOSITORY.fullmatch(name):
        return name
    try:
        folder = Path(hub.snapshot_download(name, allow_patterns=list(RUN_FILES)))
    except (OSError, ValueError) as error:  # errors of the Hub's client are OSErrors
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"load: there is no folder {printable(name)}, and the Hugging Face Hub gives none: {reason}"
        ) from error
    if not (folder / RUN_FILES[0]).is_file():
        raise UserError(f"load: the repository {printable(name)} holds no model of TailTune (export hub makes one)")
    return folder
