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
from tailtune.trainers.storage.large_tensors import FileTensor
from tailtune.trainers.storage.manifest import read_bytes, read_json

DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
"""Dtypes of streamed tensors → their names in a safetensors file."""
NAMED = {name: dtype for dtype, name in DTYPES.items()}


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
    parts = (part.reshape(-1).view(torch.uint8).numpy().data for _, _, parts in tensors.values() for part in parts)
    return write_parts(path, chain([len(text).to_bytes(8, "little"), text], parts))


def open_tensors(path: Path) -> tuple[dict[str, FileTensor], str]:
    """Open the tensors that `stream_tensors` has written. They are read from the file when they are used.

    The functions of the library map the whole file into memory.

    Args:
        path: the file, which must not be changed in place afterwards; a file that replaces it does no harm.

    Returns:
        Name → tensor, and the metadata entry `about`.

    Raises:
        ValueError, KeyError, TypeError: the content is not that of such a file.
        OSError: the file cannot be read.
    """
    file = path.open("rb", buffering=0)
    length = int.from_bytes(file.read(8), "little")
    start, size = 8 + length, path.stat().st_size
    if start > size:
        raise ValueError("it is no safetensors file")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    about = header.pop("__metadata__")["about"]
    tensors = {}
    for name, entry in header.items():
        dtype, shape, (begin, end) = NAMED[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if start + end > size or end - begin != prod(shape) * dtype.itemsize:
            raise ValueError("it is cut off")
        tensors[name] = FileTensor(file, shape, dtype, start + begin)
    return tensors, about


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
