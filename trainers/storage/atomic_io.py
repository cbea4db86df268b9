"""Files that are written whole or not at all: safetensors for tensors, JSON for the rest, no pickle."""

import glob
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save
from torch import Tensor

from tailtune.configs.errors import UserError

TENSORS, FACTS = "tensors.safetensors", "facts.json"


class Damaged(UserError):
    """A file is not what was written, or is not there."""

    def __init__(self, path: Path, reason: str, remedy: str = "") -> None:
        super().__init__(f"{path} is damaged ({reason}){remedy}")


class Digest(NamedTuple):
    """What a file held when it was written."""

    sha256: str
    size: int

    @classmethod
    def of(cls, content: bytes) -> "Digest":
        return cls(hashlib.sha256(content).hexdigest(), len(content))

    def check(self, path: Path) -> None:
        """Raise `Damaged` if the file is another one. Its size is compared before anything of it is read."""
        try:
            size = path.stat().st_size
            if size != self.size:
                raise Damaged(path, f"{size} bytes instead of {self.size}")
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise Damaged(path, error.strerror or str(error)) from error
        if found != self.sha256:
            raise Damaged(path, "its checksum is wrong")


def write_bytes(path: Path, content: bytes) -> Digest:
    """Write to a temporary name, fsync, rename.

    Raises:
        UserError: the file system refuses; whatever stood at `path` stays as it was.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True) if temporary.parent.is_dir() else None
        raise _refused(path, error) from error
    return Digest.of(content)


def write_json(path: Path, content: Any) -> Digest:
    return write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: str | None = None) -> Digest:
    """safetensors, with at most one metadata entry, `about`."""
    content = save(
        {name: each.contiguous() for name, each in tensors.items()}, {"about": metadata} if metadata else None
    )
    return write_bytes(path, content)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which appears at `path` whole or not at all; it replaces the files of one of the same name.

    Raises:
        UserError: the file system refuses.
    """
    temporary, aside = _temporary(path, "new"), _temporary(path, "old")
    try:
        for before in path.parent.glob(f".{glob.escape(path.name)}.*.old.tmp"):
            if not path.exists() and temporary_of(path.name, "old").fullmatch(before.name):
                before.replace(path)  # a kill came between
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.replace(aside)
        temporary.replace(path)
        _sync_folder(path.parent)
        if aside.exists():
            _keep_others(path, aside)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _keep_others(path: Path, aside: Path) -> None:
    """Drop what was replaced, but for what the new folder has no file of: it may be the user's."""
    for entry in aside.iterdir():
        if not os.path.lexists(path / entry.name):
            entry.replace(path / entry.name)
    shutil.rmtree(aside)


def _temporary(path: Path, kind: str = "") -> Path:
    """A name beside a path that nothing has."""
    return path.with_name(".".join(["", path.name, uuid.uuid4().hex[:8], *([kind] if kind else []), "tmp"]))


def temporary_of(name: str, kind: str = "") -> re.Pattern[str]:
    """What the names look like that a kill may leave behind."""
    end = f".{kind}.tmp" if kind else ".tmp"
    return re.compile(re.escape(f".{name}.") + "[0-9a-f]{8}" + re.escape(end))


def write_folder(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> dict[Path, Digest]:
    """A folder of `tensors.safetensors` and `facts.json`, which appears whole; it replaces one of the same name.

    Returns:
        The files' digests.
    """
    with new_folder(path) as folder:
        content = save({name: each.detach().cpu().contiguous() for name, each in tensors.items()})
        digest = write_bytes(folder / TENSORS, content)
        digests = {path / TENSORS: digest}
        digests[path / FACTS] = write_json(folder / FACTS, {**facts, "sha256": digest.sha256})
    return digests


def remove_folder(path: Path) -> None:
    """Remove what `write_folder` wrote; a folder that holds anything else stays, with that."""
    for name in (TENSORS, FACTS):
        (path / name).unlink(missing_ok=True)
    if not any(path.iterdir()):
        path.rmdir()


def _refused(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}; free the space or choose another output_dir")


def _sync_folder(path: Path) -> None:
    """Make a rename survive a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
