"""Files that are whole or absent: tensors in safetensors, the rest in JSON, no pickle."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from configs.errors import UserError


def write_bytes(path: Path, content: bytes) -> None:
    """Write to a temporary name, fsync, rename.

    Raises:
        UserError: the file system refuses; whatever stood at `path` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
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


def write_json(path: Path, content: Any) -> None:
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: str | None = None) -> None:
    """safetensors, with at most one metadata entry, `about`."""
    content = save(
        {name: each.contiguous() for name, each in tensors.items()}, {"about": metadata} if metadata else None
    )
    write_bytes(path, content)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which appears at `path` whole or not at all; it replaces one of the same name.

    Raises:
        UserError: the file system refuses.
    """
    temporary, aside = (path.with_name(f".{path.name}.{kind}.tmp") for kind in ("new", "old"))
    try:
        for each in (temporary, aside):
            shutil.rmtree(each, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.replace(aside)
        temporary.replace(path)
        _sync_folder(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_folder(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
    """A folder of `tensors.safetensors` and `facts.json`, which appears whole; it replaces one of the same name."""
    with new_folder(path) as folder:
        content = save({name: each.detach().cpu().contiguous() for name, each in tensors.items()})
        write_bytes(folder / "tensors.safetensors", content)
        write_json(folder / "facts.json", {**facts, "sha256": hashlib.sha256(content).hexdigest()})


def read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_folder` wrote.

    Raises:
        UserError: a file is missing, torn or altered.
    """
    try:
        facts = json.loads((path / "facts.json").read_text(encoding="utf-8"))
        content = (path / "tensors.safetensors").read_bytes()
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
            raise ValueError("its checksum is wrong")
        return load(content), facts
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{path} is damaged ({reason})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `UserError` for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        return content
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); start over with `resume False`") from error


def _refused(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}; free the space or choose another output_dir")


def _sync_folder(path: Path) -> None:
    """Make a rename survive a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
