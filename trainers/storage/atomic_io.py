"""Writing files and folders whole or not at all: safetensors for tensors, JSON for everything else, no pickle."""

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
    """A file is missing, or is not what was written.

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

        Raises:
            Damaged: it does not, or it cannot be read.
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
        path: the file; its folder is made where it is missing.
        content: what to write.

    Returns:
        The digest of the file.

    Raises:
        UserError: the file system refuses; what was at `path` before stays as it was.
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
        raise _write_error(path, error) from error
    return Digest.of(content)


def write_json(path: Path, content: Any) -> Digest:
    """Write a JSON file, see `write_bytes`; NaN and infinity are refused (ValueError)."""
    return write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: str | None = None) -> Digest:
    """Write a safetensors file, see `write_bytes`.

    Args:
        path: the file.
        tensors: name → tensor, on the CPU.
        metadata: text for the metadata entry `about`; None: no entry.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = save(contiguous, {"about": metadata} if metadata else None)
    return write_bytes(path, content)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, which then appears at `path` whole or not at all.

    Files of an earlier folder at `path` are replaced; files that only the earlier folder has are kept.

    Raises:
        UserError: the file system refuses.
    """
    temporary, replaced = _temporary(path, "new"), _temporary(path, "old")
    try:
        for before in path.parent.glob(f".{glob.escape(path.name)}.*.old.tmp"):
            if not path.exists() and temporary_pattern(path.name, "old").fullmatch(before.name):
                before.replace(path)  # a process was killed between the two renames below
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.replace(replaced)
        temporary.replace(path)
        _sync_folder(path.parent)
        if replaced.exists():
            _keep_other_files(path, replaced)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _keep_other_files(path: Path, replaced: Path) -> None:
    """Remove the replaced folder, but move files that the new one does not have there: they may be the user's."""
    for entry in replaced.iterdir():
        if not os.path.lexists(path / entry.name):
            entry.replace(path / entry.name)
    shutil.rmtree(replaced)


def _temporary(path: Path, kind: str = "") -> Path:
    """A temporary path in the same folder, which does not exist yet."""
    return path.with_name(".".join(["", path.name, uuid.uuid4().hex[:8], *([kind] if kind else []), "tmp"]))


def temporary_pattern(name: str, kind: str = "") -> re.Pattern[str]:
    """Pattern of the temporary names that a process may leave behind when it is killed.

    Args:
        name: name of the file or folder that was to be written.
        kind: `new` or `old` for folders; empty for files.
    """
    suffix = f".{kind}.tmp" if kind else ".tmp"
    return re.compile(re.escape(f".{name}.") + "[0-9a-f]{8}" + re.escape(suffix))


def write_folder(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> dict[Path, Digest]:
    """Write a folder with `tensors.safetensors` and `facts.json`, see `new_folder`.

    Args:
        path: the folder.
        tensors: name → tensor.
        facts: everything else, as JSON; the checksum of the tensors is added.

    Returns:
        The digests of the two files.
    """
    with new_folder(path) as folder:
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        digest = write_bytes(folder / TENSORS, content)
        digests = {path / TENSORS: digest}
        digests[path / FACTS] = write_json(folder / FACTS, {**facts, "sha256": digest.sha256})
    return digests


def remove_folder(path: Path) -> None:
    """Remove what `write_folder` wrote. If the folder holds other files, it stays with these."""
    for name in (TENSORS, FACTS):
        (path / name).unlink(missing_ok=True)
    if not any(path.iterdir()):
        path.rmdir()


def _write_error(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}; free the space or choose another output_dir")


def _sync_folder(path: Path) -> None:
    """Make sure that a rename survives a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
