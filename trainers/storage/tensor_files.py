"""Writes and reads tensors: safetensors files, and folders with tensors and facts. Nothing is pickled."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tailtune.trainers.storage.atomic_io import FACTS, TENSORS, Damaged, Digest, new_folder, write_bytes, write_json
from tailtune.trainers.storage.manifest import read_bytes, read_json


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: str | None = None) -> Digest:
    """Write a safetensors file as `write_bytes` does.

    Args:
        path: the file.
        tensors: name → tensor, on the CPU.
        metadata: text for the metadata entry `about`; None: no entry.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = save(contiguous, {"about": metadata} if metadata else None)
    return write_bytes(path, content)


def write_folder(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> dict[Path, Digest]:
    """Write a folder with `tensors.safetensors` and `facts.json` as `new_folder` does.

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


def read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the facts that `write_folder` wrote.

    Raises:
        Damaged: a file is missing, incomplete or changed.
    """
    try:
        facts, content = read_json(path / FACTS), read_bytes(path / TENSORS)
        if hashlib.sha256(content).hexdigest() != facts.get("sha256"):
            raise ValueError("its checksum is wrong")
        return load(content), facts
    except (ValueError, SafetensorError) as error:
        raise Damaged(path, str(error)) from error
