"""Writes files and folders completely or not at all. `tensor_files.py` writes tensors with these functions."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tailtune.configs.atomic_file import atomic_file, atomic_folder
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


class CannotWrite(UserError):
    """The file system refuses to write. The cause is its `OSError`."""


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
    """`atomic_folder`, for the files of a run.

    Args:
        path: the folder to write.

    Yields:
        The temporary folder.

    Raises:
        UserError: the file system refuses to write.
    """
    try:
        with atomic_folder(path) as temporary:
            yield temporary
    except OSError as error:
        raise _write_error(path, error) from error


def remove_folder(path: Path) -> None:
    """Remove the files that `write_folder` wrote. The folder itself stays if it holds other files."""
    for name in (TENSORS, FACTS):
        (path / name).unlink(missing_ok=True)
    if not any(path.iterdir()):
        path.rmdir()


def _write_error(path: Path, error: OSError) -> UserError:
    return CannotWrite(f"cannot write {path}: {error.strerror}; free the space or choose another output_dir")
