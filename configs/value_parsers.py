"""Parses values of options, from the command line (always text) or from YAML (typed), to the declared type.

Each parser `as_…` takes the value of an option and returns it in the declared type. It raises a ValueError that
describes the expected value, such as "a whole number". `check_text` is called before every parser.
"""

from typing import Any
from unicodedata import category

from tailtune.configs.yaml_reader import parse_yaml

MAX_FLOAT = 3.4e38
"""Largest absolute value of a number. It is about the largest value of single precision."""
INTEGER_BOUND = 2**63
"""Whole numbers have 64 bits: at least −INTEGER_BOUND, and less than INTEGER_BOUND."""
MAX_TEXT_CHARACTERS = 20_000
"""Largest length of a text. For comparison, all templates of CLIP's prompt ensemble together have 3,000 characters."""
MAX_NAME_BYTES = 255
"""Largest length of a file or folder name on common file systems, in bytes."""
MAX_PATH_BYTES = 3000
"""Largest length of a path, in bytes. Linux allows 4,096, but names of files in a folder are appended to its path."""


def check_text(value: Any) -> None:
    """Check that text can be used as a name, as a path and in a log.

    Args:
        value: a value of an option. Lists and mappings are searched for text.

    Raises:
        ValueError: a text is not UTF-8, or contains control characters or line breaks.
    """
    if isinstance(value, str):
        kinds = set(map(category, value))
        if "Cs" in kinds:  # a lone surrogate, by which Python replaces a byte that is not UTF-8
            raise ValueError("text in UTF-8")
        if kinds & {"Cc", "Zl", "Zp"}:
            raise ValueError("one line of text without control characters")
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_text(item)
    elif isinstance(value, dict):
        for pair in value.items():
            check_text(pair)


def as_str(value: Any) -> str:
    """Text of limited length."""
    if isinstance(value, (dict, list)):
        raise ValueError("text")
    text = str(value)
    if len(text) > MAX_TEXT_CHARACTERS:
        raise ValueError(f"text of at most {MAX_TEXT_CHARACTERS:,} characters")
    return text


def as_path(value: Any) -> str:
    """Text that may be the path of a file or folder."""
    text = as_str(value)
    if not text:  # such as an unset shell variable; an empty path would be the working directory
        raise ValueError("a path")
    if len(text.encode()) > MAX_PATH_BYTES or any(len(part.encode()) > MAX_NAME_BYTES for part in text.split("/")):
        raise ValueError(f"a path of at most {MAX_PATH_BYTES} bytes, {MAX_NAME_BYTES} in a name")
    return text


def as_folder(value: Any) -> str:
    """A folder inside output/, or an absolute path. The path must not contain `..`."""
    text = as_path(value)
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        raise ValueError("a folder below output/, or an absolute path; neither with `..`")
    return text


def as_paths(value: Any) -> list[str]:
    """Paths: `[output/a, output/b]`, or `output/a,output/b`."""
    return [as_path(path) for path in as_names(value)]


def as_bool(value: Any) -> bool:
    """`True` or `False`, in any case of letters."""
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    raise ValueError("True or False")


def as_int(value: Any) -> int:
    """A whole number that fits into 64 bits."""
    try:
        number = value if isinstance(value, int) and not isinstance(value, bool) else int(str(value))
    except ValueError:  # also raised for more digits than Python reads
        raise ValueError("a whole number") from None
    if not -INTEGER_BOUND <= number < INTEGER_BOUND:
        raise ValueError("a whole number of at most 64 bits")
    return number


def as_float(value: Any) -> float:
    """A finite number in the range of single precision."""
    try:
        number = float("" if isinstance(value, bool) else value)
    except (ValueError, TypeError):
        raise ValueError("a number") from None
    except OverflowError:
        number = float("inf")
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError("a finite number")
    if abs(number) > MAX_FLOAT:
        raise ValueError(f"a number up to {MAX_FLOAT:g}, which single precision holds")
    return number


def as_micro(value: Any) -> int | str:
    """A micro-batch size: a whole number of at least 1, or `auto`."""
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
    """A range of blocks: a number k for the last k blocks, or `[start,end)`."""
    value = _structure(value.replace("(", "[").replace(")", "]") if isinstance(value, str) else value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(type(end) is int for end in value):
        start, end = value
        if 0 <= start <= end:
            return [start, end]
    raise ValueError("a number of blocks such as 6, or a range such as [0,6]")


def as_scale(value: Any) -> float | str:
    """A scale: a number, or `learnable`."""
    if value == "learnable":
        return "learnable"
    try:
        return as_float(value)
    except ValueError:
        raise ValueError("learnable or a number") from None


def as_mapping(value: Any) -> dict[str, Any]:
    """A mapping, written `{key: value, …}` as in YAML."""
    value = _structure(value)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("a mapping such as {r: 8}")
    return value


def as_names(value: Any) -> list[str]:
    """Names: `[uniform, forward50]`, or `uniform,forward50`."""
    value = _structure(value)
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if isinstance(names, list) and names and all(isinstance(name, str) and name for name in names):
        return names
    raise ValueError("names such as uniform,forward50")


def as_ints(value: Any) -> list[int]:
    """Whole numbers from 0 on in ascending order: `[160, 180]`, or a single number."""
    value = _structure(value)
    numbers = [value] if type(value) is int else value
    whole = isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)
    if whole and numbers == sorted(numbers):
        return [as_int(number) for number in numbers]
    raise ValueError("ascending whole numbers such as [160, 180]")


def as_factors(value: Any) -> dict[str, float]:
    """A mapping from names to numbers: `{tuner: 0.1}`."""
    return {name: as_float(number) for name, number in as_mapping(value).items()}


def as_triple(value: Any) -> list[float]:
    """One number for each of red, green and blue: `[0.5, 0.5, 0.5]`."""
    return _numbers(value, 3, "three numbers such as [0.5, 0.5, 0.5]")


def as_pair(value: Any) -> list[float]:
    """Two numbers: `[0.9, 0.999]`."""
    return _numbers(value, 2, "two numbers such as [0.9, 0.999]")


def as_numbers(value: Any) -> list[float]:
    """Numbers: `[0, 1.25, 2.5]`, or a single one."""
    value = _structure(value)
    expected = "numbers such as [0, 1.25, 2.5]"
    return _numbers(value if isinstance(value, list) else [value], None, expected)


def _numbers(value: Any, count: int | None, expected: str) -> list[float]:
    """A list of `count` numbers, or of at least one."""
    try:
        numbers = [as_float(number) for number in _structure(value)]
    except (ValueError, TypeError):
        numbers = []
    if not numbers or len(numbers) != (count or len(numbers)):
        raise ValueError(expected)
    return numbers


def _structure(value: Any) -> Any:
    """Parse text from the command line as YAML (None if the text is not YAML). Return any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        parsed = parse_yaml(value)
    except ValueError:
        return None
    check_text(parsed)  # again, because parsing turns an escape such as "\0" into a control character
    return parsed
