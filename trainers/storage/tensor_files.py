"""Writes and reads tensors: safetensors files, and folders with tensors and facts. Nothing is pickled."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tailtune.trainers.storage.atomic_io import (
    FACTS,
    TENSORS,
    Damaged,
    Digest,
    new_folder,
    write_bytes,
    write_json,
    write_parts,
)
from tailtune.trainers.storage.large_tensors import MappedTensor
from tailtune.trainers.storage.manifest import read_bytes, read_json

DTYPES = {torch.int64: "I64", torch.float32: "F32", torch.float16: "F16"}
"""Dtypes of streamed tensors → their names in a safetensors file."""


def stream_tensors(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int], Iterable[Tensor]]], metadata: str
) -> Digest:
    """Write a safetensors file as `write_bytes` does, without all of its content in memory.

    Args:
        path: the file.
        tensors: name → dtype, shape, and parts of the tensor along its first dimension, on the CPU. Tensors whose
            elements take more bytes come first, so that all are aligned.
        metadata: text for the metadata entry `about`.
    """
    header: dict[str, Any] = {"__metadata__": {"about": metadata}}
    end = 0
    for name, (dtype, shape, _) in tensors.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    parts = (part.reshape(-1).numpy().data for _, _, parts in tensors.values() for part in parts)
    return write_parts(path, chain([len(text).to_bytes(8, "little"), text], parts))


def map_tensor(path: Path, name: str) -> MappedTensor:
    """A tensor in a safetensors file, which is read from the file when it is used.

    Args:
        path: the file, which must not be changed in place afterwards; a file that replaces it does no harm.
        name: name of the tensor.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        dtype = next(dtype for dtype, text in DTYPES.items() if text == entry["dtype"])
        return MappedTensor(file, entry["shape"], dtype, 8 + length + entry["data_offsets"][0])


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
