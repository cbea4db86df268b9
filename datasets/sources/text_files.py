"""Text files that users write (lists, class names, JSON), read so that no content takes long or much memory."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tailtune.configs.errors import UserError
from tailtune.datasets.images.regular_files import NoFile, open_regular

MAX_LINE = 1 << 16
"""Characters; a file with a longer line is no list, however large it is."""
MAX_JSON = 1 << 26
"""Bytes of a JSON file, 64 MiB; that of iNaturalist's categories has 2."""


def numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line without blanks at its ends) of every line; any line ends, with or without a BOM.

    Raises:
        UserError: not a regular file, not UTF-8, or a line that no text has.
    """
    try:
        descriptor, _ = open_regular(file)
    except NoFile as reason:
        raise UserError(f"cannot read {file}: {reason}") from None
    with os.fdopen(descriptor, encoding="utf-8-sig") as text:
        number = 0
        try:
            while line := text.readline(MAX_LINE):
                number += 1
                if "\0" in line or len(line) == MAX_LINE:
                    what = "holds a NUL character" if "\0" in line else f"has more than {MAX_LINE} characters"
                    raise UserError(f"{file} line {number} {what}: this is not a text file")
                yield number, line.strip()
        except UnicodeDecodeError:
            raise UserError(f"{file} is not a text file in UTF-8") from None


def read_json(file: Path, key: str) -> Any:
    """The content of a JSON file that the option `key` names.

    Raises:
        UserError: not a regular file, too large, or not JSON.
    """
    try:
        descriptor, status = open_regular(file)
        with os.fdopen(descriptor, "rb") as data:
            if status.st_size > MAX_JSON:
                raise UserError(f"{key}: {file} is larger than {MAX_JSON >> 20} MiB")
            return json.loads(data.read().decode("utf-8-sig"))
    except NoFile as reason:
        raise UserError(f"{key}: cannot read {file}: {reason}") from None
    except RecursionError:
        raise UserError(f"{key}: {file} is nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, or a number of more than 4300 digits
        raise UserError(f"{key}: {file} is not JSON: {error}") from None
