"""Packages that only some scripts need."""

from importlib import import_module
from typing import Any

from tailtune.configs.errors import UserError

LIST = "requirements-sweep.txt"
"""Also the extra `sweep` of the package."""


def required(name: str) -> Any:
    """Import a package of `requirements-sweep.txt`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; run `pip install -r {LIST}`") from error
