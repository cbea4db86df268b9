"""Writes files and folders completely or not at all: under a temporary name first, then fsync, then rename."""

import glob
import os
import re
import shutil
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


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Within the block, provide a temporary folder; at the end of the block it is renamed to `path`.

    Files of an earlier folder at `path` are replaced. Files that only the earlier folder has are kept.

    Args:
        path: the folder to write.

    Yields:
        The temporary folder.

    Raises:
        OSError: the file system refuses to write.
    """
    temporary, replaced = temporary_path(path, "new"), temporary_path(path, "old")
    try:
        for before in path.parent.glob(f".{glob.escape(path.name)}.*.old.tmp"):
            if not path.exists() and temporary_pattern(path.name, "old").fullmatch(before.name):
                before.replace(path)  # a process was killed between the two renames below
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.replace(replaced)
        temporary.replace(path)
        sync_folder(path.parent)
        if replaced.exists():
            _keep_other_files(path, replaced)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _keep_other_files(path: Path, replaced: Path) -> None:
    """Remove the replaced folder. First move files that the new folder lacks into it: they may belong to the user."""
    for entry in replaced.iterdir():
        if not os.path.lexists(path / entry.name):
            entry.replace(path / entry.name)
    shutil.rmtree(replaced)


def temporary_path(path: Path, kind: str = "") -> Path:
    """A new temporary path in the same folder; nothing exists at this path.

    Args:
        path: the file or folder that is to be written.
        kind: a word that becomes part of the name; empty for none.
    """
    return path.with_name(".".join(["", path.name, uuid.uuid4().hex[:8], *([kind] if kind else []), "tmp"]))


def temporary_pattern(name: str, kind: str = "") -> re.Pattern[str]:
    """Regular expression for the temporary names that a killed process may leave behind.

    Args:
        name: name of the file or folder that was to be written.
        kind: `new` or `old` for folders; empty for files.
    """
    suffix = f".{kind}.tmp" if kind else ".tmp"
    return re.compile(re.escape(f".{name}.") + "[0-9a-f]{8}" + re.escape(suffix))


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
