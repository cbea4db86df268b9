"""Parsers of option values: from the command line (always text) or YAML (typed) to the declared type.

Each takes a value and returns it typed, or raises ValueError with what was expected.
"""

from typing import Any

import yaml


def as_str(value: Any) -> str:
    if isinstance(value, (dict, list)):
        raise ValueError("text")
    return str(value)


def as_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    raise ValueError("True or False")


def as_int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        return int(str(value))
    except ValueError:
        raise ValueError("a whole number") from None


def as_float(value: Any) -> float:
    try:
        number = float("" if isinstance(value, bool) else value)
    except (ValueError, TypeError):
        raise ValueError("a number") from None
    except OverflowError:
        raise ValueError("a finite number") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError("a finite number")
    return number


def as_micro(value: Any) -> int | str:
    """A micro-batch size: a positive int or `auto`."""
    if value == "auto":
        return "auto"
    try:
        number = as_int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError("a whole number of at least 1, or auto")
    return number


def as_span(value: Any) -> int | list[int]:
    """A range of blocks: an int (the last k) or `[start,end)`."""
    value = _structure(value.replace("(", "[").replace(")", "]") if isinstance(value, str) else value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(type(end) is int for end in value):
        start, end = value
        if 0 <= start <= end:
            return [start, end]
    raise ValueError("a number of blocks such as 6, or a range such as [0,6]")


def as_scale(value: Any) -> float | str:
    """A factor: `learnable` or a number."""
    if value == "learnable":
        return "learnable"
    try:
        return as_float(value)
    except ValueError:
        raise ValueError("learnable or a number") from None


def as_mapping(value: Any) -> dict[str, Any]:
    """`{key: value, …}` as in YAML."""
    value = _structure(value)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("a mapping such as {r: 8}")
    return value


def as_names(value: Any) -> list[str]:
    """Names: `[uniform, forward50]`, or `uniform,forward50`."""
    value = _structure(value)
    found = [each.strip() for each in value.split(",")] if isinstance(value, str) else value
    if isinstance(found, list) and found and all(isinstance(each, str) and each for each in found):
        return found
    raise ValueError("names such as uniform,forward50")


def as_ints(value: Any) -> list[int]:
    """Whole numbers, none below 0, in ascending order: `[160, 180]`."""
    value = _structure(value)
    found = [value] if type(value) is int else value
    if isinstance(found, list) and all(type(each) is int and each >= 0 for each in found) and found == sorted(found):
        return found
    raise ValueError("ascending whole numbers such as [160, 180]")


def as_factors(value: Any) -> dict[str, float]:
    """Name → number: `{tuner: 0.1}`."""
    return {name: as_float(each) for name, each in as_mapping(value).items()}


def as_triple(value: Any) -> list[float]:
    """One number for each of red, green and blue: `[0.5, 0.5, 0.5]`."""
    try:
        numbers = [as_float(each) for each in _structure(value)]
    except (ValueError, TypeError):
        numbers = []
    if len(numbers) != 3:
        raise ValueError("three numbers such as [0.5, 0.5, 0.5]")
    return numbers


def _structure(value: Any) -> Any:
    """Text from the command line read as YAML, None where it is none; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return None
