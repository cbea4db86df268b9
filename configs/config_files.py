"""Finds the config files of configs/data and configs/model, and those of the user."""

import os
from pathlib import Path

from tailtune.configs.errors import UserError, lookup, printable
from tailtune.configs.value_parsers import check_text

FOLDER = Path(__file__).resolve().parent


def names(kind: str) -> dict[str, Path]:
    """The shipped configs of a kind (`data` or `model`): name → file, sorted."""
    return {path.stem: path for path in sorted((FOLDER / kind).glob("*.yaml"))}


def is_shipped(kind: str, path: Path) -> bool:
    """Whether a file is one of the shipped configs of a kind (`data` or `model`)."""
    return path.resolve().parent == FOLDER / kind


def describe(path: Path) -> str:
    """The first line of a config file, a comment, for `--list`."""
    return path.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("#").strip()


def find_config(kind: str, name: str) -> Path:
    """Find a shipped config by its name, or a YAML of the user by its path.

    Args:
        kind: `data` or `model`.
        name: the name, or the path.

    Raises:
        UserError: there is none, or the file's name cannot be part of a run's name.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if not os.path.isfile(name):  # `Path.is_file` raises an error if the name is too long
            given = "a YAML file or of a folder with class folders" if kind == "data" else "a YAML file"
            raise UserError(f"{kind} config '{printable(name)}' does not exist: give the path of {given}")
        try:
            check_text(Path(name).name)
        except ValueError as error:
            raise UserError(f"{kind} config '{printable(name)}': its name must be {error}; rename the file") from None
        return Path(name)
    return lookup(names(kind), name, f"{kind} config")
