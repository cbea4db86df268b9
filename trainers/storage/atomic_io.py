"""Writes files and folders completely or not at all. `tensor_files.py` writes tensors with these functions."""

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tailtune.configs.atomic_file import atomic_file, sync_folder, temporary_path
from tailtune.configs.errors import UserError

TENSORS, FACTS = "tensors.safetensors", "facts.json"


class Damaged(UserError):
    """A file is missing, or its content has changed since it was written.

    Args:
        path: the file.
        reason: what is wrong.
        remedy: what the user can do, as the end of the sentence.
    """

    def __init__(self, path: Path, reason: str, remedy: str = "") -> None:
        super().__init__(f"{path} is damaged ({reason}){remedy}")


class Digest(NamedTuple):
    """Checksum and size in bytes of a file when it was written."""

    sha256: str
    size: int

    @classmethod
    def of(cls, content: bytes) -> "Digest":
        """The digest of a file with this content."""
        return cls(hashlib.sha256(content).hexdigest(), len(content))

    def check(self, path: Path) -> None:
        """Check that a file still has this digest. The size is compared first, before the file is read.

        Args:
            path: the file.

        Raises:
            Damaged: the digest differs, or the file cannot be read.
        """
        try:
            size = path.stat().st_size
            if size != self.size:
                raise Damaged(path, f"{size} bytes instead of {self.size}")
            with path.open("rb") as file:
                checksum = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise Damaged(path, error.strerror or str(error)) from error
        if checksum != self.sha256:
            raise Damaged(path, "its checksum is wrong")


def write_bytes(path: Path, content: bytes) -> Digest:
    """Write a file: under a temporary name first, then fsync, then rename.

    Args:
        path: the file; a missing folder is created.
        content: the bytes to write.

    Returns:
        The digest of the file.

    Raises:
        UserError: the file system refuses to write; an existing file at `path` is then unchanged.
    """
    return write_parts(path, [content])


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> Digest:
    """Write a file as `write_bytes` does, from parts of its content."""
    checksum, size = hashlib.sha256(), 0
    try:
        with atomic_file(path) as file:
            for part in parts:
                checksum.update(part)
                size += file.write(part)
    except OSError as error:
        raise _write_error(path, error) from error
    return Digest(checksum.hexdigest(), size)


def write_json(path: Path, content: Any) -> Digest:
    """Write a JSON file as `write_bytes` does. Raises ValueError if `content` holds NaN or infinity."""
    return write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Within the block, provide a temporary folder; at the end of the block it is renamed to `path`.

    Files of an earlier folder at `path` are replaced. Files that only the earlier folder has are kept.

    Args:
        path: the folder to write.

    Yields:
        The temporary folder.

    Raises:
        UserError: the file system refuses to write.
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
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _keep_other_files(path: Path, replaced: Path) -> None:
    """Remove the replaced folder. First move files that the new folder lacks into it: they may belong to the user."""
    for entry in replaced.iterdir():
        if not os.path.lexists(path / entry.name):
            entry.replace(path / entry.name)
    shutil.rmtree(replaced)


def temporary_pattern(name: str, kind: str = "") -> re.Pattern[str]:
    """Regular expression for the temporary names that a killed process may leave behind.

    Args:
        name: name of the file or folder that was to be written.
        kind: `new` or `old` for folders; empty for files.
    """
    suffix = f".{kind}.tmp" if kind else ".tmp"
    return re.compile(re.escape(f".{name}.") + "[0-9a-f]{8}" + re.escape(suffix))


def remove_folder(path: Path) -> None:
    """Remove the files that `write_folder` wrote. The folder itself stays if it holds other files."""
    for name in (TENSORS, FACTS):
        (path / name).unlink(missing_ok=True)
    if not any(path.iterdir()):
        path.rmdir()


def _write_error(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}; free the space or choose another output_dir")
