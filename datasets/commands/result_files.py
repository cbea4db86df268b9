"""Names the files of the data commands, and writes them completely or not at all."""

import json
import re
from pathlib import Path
from typing import Any

from tailtune.configs.atomic_file import atomic_file
from tailtune.configs.errors import UserError


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file.

    Args:
        path: the file; an existing file is replaced.
        content: what it shall hold.

    Raises:
        UserError: the file system refuses to write; an existing file is then unchanged.
    """
    try:
        with atomic_file(path) as file:
            file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(errors="surrogateescape"))
    except OSError as error:
        raise cannot_write(path, error) from error


def plain_name(text: str) -> str:
    """A name for a data config and its run folders: letters and digits of any script, `_` and `-`.

    Args:
        text: the name of a folder or of data.
    """
    return re.sub(r"[^\w-]+", "_", text).strip("_-") or "data"


def cannot_write(path: Path, error: OSError) -> UserError:
    """The error for a file that cannot be written.

    Args:
        path: the file.
        error: what the file system says.
    """
    return UserError(f"cannot write {path}: {error.strerror}; free the space or choose another folder")
