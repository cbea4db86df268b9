"""`words_of`: options that Python gives as keywords, as the words of a command line."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

from tailtune.configs import UserError
from tailtune.configs.errors import printable


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Options as the words of a command line, so that a run has the same name and hash as that of the command.

    Args:
        options: name → value. Texts are parsed as on the command line.

    Returns:
        `KEY VALUE KEY VALUE …`.

    Raises:
        UserError: a value cannot be written as a word.
    """
    return [word for key, value in options.items() for word in (key, _word(key, value))]


def _word(key: str, value: Any) -> str:
    if value is None:
        return "none"
    value = _without_numpy(value)
    if not isinstance(value, (list, dict)):
        return str(value)
    try:
        return yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True).strip()
    except yaml.YAMLError:
        raise UserError(f"{key}: '{printable(value)}' must hold texts and numbers only") from None


def _without_numpy(value: Any) -> Any:
    """The value with plain numbers and lists in place of those of NumPy and of tuples."""
    if isinstance(value, dict):
        return {_without_numpy(name): _without_numpy(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_without_numpy(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
