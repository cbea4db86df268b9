"""Writes a file completely or not at all: under a temporary name first, then fsync, then rename."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Within the block, provide an open file with a temporary name. At the end of the block it is renamed to `path`.

    Args:
        path: the file to write; a missing folder is created. An existing file is replaced.

    Yields:
        The temporary file, open for writing.

    Raises:
        OSError: the file system refuses to write. An existing file at `path` is then unchanged, as it is after any
            other exception inside the block.
    """
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def temporary_path(path: Path, kind: str = "") -> Path:
    """A new temporary path in the same folder; nothing exists at this path.

    Args:
        path: the file or folder that is to be written.
        kind: a word that becomes part of the name; empty for none.
    """
    return path.with_name(".".join(["", path.name, uuid.uuid4().hex[:8], *([kind] if kind else []), "tmp"]))


def sync_folder(path: Path) -> None:
    """Make sure that a rename inside a folder survives a power loss.

    Args:
        path: the folder.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
