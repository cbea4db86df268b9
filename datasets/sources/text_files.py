"""Reads text files of users (lists, class names, JSON) within limits, so that no content takes long or much memory."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tailtune.configs.errors import UserError
from tailtune.datasets.images.regular_files import NotARegularFile, open_regular

MAX_LINE = 1 << 16
"""Longest line of a text file, in characters."""
MAX_JSON = 1 << 26
"""Largest JSON file in bytes (64 MiB). For comparison: iNaturalist's categories.json has 2 MiB."""


def numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file in UTF-8, with any line ends, with or without a byte-order mark.

    Args:
        file: the file.

    Yields:
        Number of the line from 1, and the line without blanks at its ends.

    Raises:
        UserError: not a regular file, not UTF-8, or a line that is too long or holds a NUL character.
    """
    try:
        descriptor, _ = open_regular(file)
    except NotARegularFile as reason:
        raise UserError(f"cannot read {file}: {reason}") from None
    with os.fdopen(descriptor, encoding="utf-8-sig") as text:
        number = 0
        try:
            while line := text.readline(MAX_LINE):
                number += 1
                if "\0" in line or len(line) == MAX_LINE:
                    problem = "holds a NUL character" if "\0" in line else f"has more than {MAX_LINE} characters"
                    raise UserError(f"{file} line {number} {problem}: this is not a text file")
                yield number, line.strip()
        except UnicodeDecodeError:
            raise UserError(f"{file} is not a text file in UTF-8: save it in this encoding") from None


def read_json(file: Path, key: str) -> Any:
    """The content of a JSON file.

    Args:
        file: the file.
        key: the option that names it, for messages.

    Raises:
        UserError: not a regular file, too large, or not JSON.
    """
    try:
        descriptor, status = open_regular(file)
        with os.fdopen(descriptor, "rb") as data:
            if status.st_size > MAX_JSON:
                raise UserError(f"{key}: {file} is larger than {MAX_JSON >> 20} MiB")
            return json.loads(data.read().decode("utf-8-sig"))
    except NotARegularFile as reason:
        raise UserError(f"{key}: cannot read {file}: {reason}") from None
    except RecursionError:
        raise UserError(f"{key}: {file} is nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, or a number of more than 4300 digits
        raise UserError(f"{key}: {file} is not JSON: {error}") from None
