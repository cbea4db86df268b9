"""Parsers of option values: from the command line (always text) or YAML (typed) to the declared type.

Each takes a value and returns it typed, or raises ValueError with what was expected. Text of any kind is checked by
`readable` before.
"""

from typing import Any
from unicodedata import category

from tailtune.configs.yaml_reader import parse_yaml

LARGEST = 3.4e38
"""Of a number, whatever its sign: what single precision holds."""
WHOLE = 2**63
"""Whole numbers are below this, and from its negative on: 64 bits."""
TEXT = 20_000
"""Characters of a text; the templates of CLIP's ensemble have 3,000 together."""
NAME = 255
"""Bytes of one name in a path, on every usual file system."""
PATH = 3000
"""Bytes of a path; Linux takes 4,096, and names of files within a folder come on top."""


def readable(value: Any) -> None:
    """Raise ValueError where text anywhere in a value could be neither a name, nor a path, nor a line of a log."""
    if isinstance(value, str):
        kinds = set(map(category, value))
        if "Cs" in kinds:  # half of a pair: what Python makes of bytes that are no UTF-8
            raise ValueError("text in UTF-8")
        if kinds & {"Cc", "Zl", "Zp"}:
            raise ValueError("one line of text without control characters")
    elif isinstance(value, (list, tuple)):
        for each in value:
            readable(each)
    elif isinstance(value, dict):
        for pair in value.items():
            readable(pair)


def as_str(value: Any) -> str:
    if isinstance(value, (dict, list)):
        raise ValueError("text")
    text = str(value)
    if len(text) > TEXT:
        raise ValueError(f"text of at most {TEXT:,} characters")
    return text


def as_path(value: Any) -> str:
    """Text that may be the path of a file or folder."""
    text = as_str(value)
    if not text:  # as of a shell's variable that is not set; it would mean the working directory
        raise ValueError("a path")
    if len(text.encode()) > PATH or any(len(part.encode()) > NAME for part in text.split("/")):
        raise ValueError(f"a path of at most {PATH} bytes, {NAME} in a name")
    return text


def as_folder(value: Any) -> str:
    """A folder below output/: a path that does not lead out of it, or an absolute one, which is meant."""
    text = as_path(value)
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        raise ValueError("a folder below output/, or an absolute path; neither with `..`")
    return text


def as_paths(value: Any) -> list[str]:
    """Paths: `[output/a, output/b]`, or `output/a,output/b`."""
    return [as_path(each) for each in as_names(value)]


def as_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    raise ValueError("True or False")


def as_int(value: Any) -> int:
    """A whole number of 64 bits."""
    try:
        number = value if isinstance(value, int) and not isinstance(value, bool) else int(str(value))
    except ValueError:  # also of more digits than Python reads
        raise ValueError("a whole number") from None
    if not -WHOLE <= number < WHOLE:
        raise ValueError("a whole number of at most 64 bits")
    return number


def as_float(value: Any) -> float:
    """A number that single precision holds, which most are computed in."""
    try:
        number = float("" if isinstance(value, bool) else value)
    except (ValueError, TypeError):
        raise ValueError("a number") from None
    except OverflowError:
        number = float("inf")
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError("a finite number")
    if abs(number) > LARGEST:
        raise ValueError(f"a number up to {LARGEST:g}, which single precision holds")
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
        return [as_int(each) for each in found]
    raise ValueError("ascending whole numbers such as [160, 180]")


def as_factors(value: Any) -> dict[str, float]:
    """Name → number: `{tuner: 0.1}`."""
    return {name: as_float(each) for name, each in as_mapping(value).items()}


def as_triple(value: Any) -> list[float]:
    """One number for each of red, green and blue: `[0.5, 0.5, 0.5]`."""
    return _numbers(value, 3, "three numbers such as [0.5, 0.5, 0.5]")


def as_pair(value: Any) -> list[float]:
    """Two numbers: `[0.9, 0.999]`."""
    return _numbers(value, 2, "two numbers such as [0.9, 0.999]")


def _numbers(value: Any, count: int, expected: str) -> list[float]:
    """A list of so many numbers."""
    try:
        numbers = [as_float(number) for number in _structure(value)]
    except (ValueError, TypeError):
        numbers = []
    if len(numbers) != count:
        raise ValueError(expected)
    return numbers


def _structure(value: Any) -> Any:
    """Text from the command line read as YAML, None where it is none; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = parse_yaml(value)
    except ValueError:
        return None
    readable(found)  # an escape such as "\0" has become what it stands for
    return found
