"""The index of the shards of one split: where each image is, its class, its path, and a checksum of its bytes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from tailtune.configs.errors import UserError, printable
from tailtune.datasets.sources.path_list import PathList

VERSION = 1
"""Version of the format. A program that finds another one refuses it."""
HEADER_KEY = "tailtune_shards"
"""The one metadata entry of the safetensors file. (The order of several would change from file to file.)"""
COLUMNS = ("shard", "offset", "size", "label", "crc32")


def index_name(split: str) -> str:
    """Name of the index file of a split.

    Args:
        split: `train`, `val` or `test`.
    """
    return f"{split}.index.safetensors"


class WrongIndex(UserError):
    """A file is no index of shards, or one that this version cannot read."""


@dataclass(frozen=True)
class Shard:
    """A tar file of the set."""

    name: str
    """Its name in the folder of the index."""
    size: int
    """Its size in bytes."""


@dataclass(frozen=True)
class ShardIndex:
    """N images in tar files."""

    split: str
    shards: Sequence[Shard]
    splits: tuple[str, ...]
    """The splits of the set; each has an index."""
    class_names: tuple[str, ...]
    """C names in the order of the labels; the same in all splits of a set."""
    paths: PathList
    """Path of each image in the data that the shards were made of, or its name in the tar file, [N]."""
    labels: np.ndarray
    """int64 [N]."""
    shard: np.ndarray
    """Number of each image's tar file, unsigned [N]."""
    offset: np.ndarray
    """Where the encoded image begins in the tar file, in bytes, int64 [N]."""
    size: np.ndarray
    """Size of the encoded image in bytes, int64 or unsigned [N]."""
    crc32: np.ndarray
    """CRC-32 of the encoded image, uint32 [N]."""

    def encoded(self) -> bytes:
        """The content of the index file; the same for the same index."""
        from safetensors.numpy import save

        block, ends = self.paths.packed()
        small = np.uint32 if self.size.max(initial=0) < 2**32 else np.int64
        tensors = {
            "shard": self.shard.astype(np.uint16 if len(self.shards) <= 2**16 else np.uint32),
            "offset": self.offset.astype(np.int64),
            "size": self.size.astype(small),
            "label": self.labels.astype(np.int32),
            "crc32": self.crc32.astype(np.uint32),
            "paths": np.frombuffer(block, dtype=np.uint8),
            "path_ends": ends,
        }
        header = {
            "version": VERSION,
            "split": self.split,
            "splits": list(self.splits),
            "class_names": list(self.class_names),
            "shards": [[shard.name, shard.size] for shard in self.shards],
        }
        return save(tensors, metadata={HEADER_KEY: json.dumps(header)})


def read_index(content: bytes, where: str, split: str) -> ShardIndex:
    """Read an index file, and check that it is whole and fits together.

    Args:
        content: the content of the file.
        where: the path or address of the file, for messages.
        split: the split that it has to be of.

    Raises:
        WrongIndex: the file is damaged, of another version or split, or its parts do not fit together.
    """
    header, tensors = _parts(content, where)
    if header["version"] != VERSION:
        raise WrongIndex(
            f"{where} has version {printable(header['version'])} of the format, but this TailTune reads version "
            f"{VERSION}: write it again with data shard"
        )
    try:
        index = _assembled(header, tensors)
        problem = _problem(index)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(where) from error
    if problem:
        raise WrongIndex(f"{where}: {problem}; write the index again with data shard")
    if index.split != split:
        raise WrongIndex(f"{where} is the index of the split {printable(index.split)}: rename it")
    return index


def _damaged(where: str) -> WrongIndex:
    return WrongIndex(f"{where} is damaged or no index of shards: copy it again, or write it again with data shard")


def _parts(content: bytes, where: str) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
    """The header and the tensors of an index file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][HEADER_KEY])
        assert isinstance(header, dict) and "version" in header
    except (SafetensorError, KeyError, TypeError, ValueError, AssertionError) as error:
        raise _damaged(where) from error
    return header, tensors


def _assembled(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> ShardIndex:
    columns = {name: tensors[name] for name in COLUMNS}
    ends = tensors["path_ends"]
    if {column.shape for column in columns.values()} != {(len(ends) - 1,)} or tensors["paths"].dtype != np.uint8:
        raise ValueError("columns of different lengths")
    if not all(np.issubdtype(column.dtype, np.integer) for column in (*columns.values(), ends)):
        raise ValueError("columns that are no whole numbers")
    if ends[0] != 0 or ends[-1] != len(tensors["paths"]) or (ends[1:] < ends[:-1]).any():
        raise ValueError("paths that overlap")
    return ShardIndex(
        split=header["split"],
        splits=tuple(map(str, header["splits"])),
        shards=tuple(Shard(str(name), int(size)) for name, size in header["shards"]),
        class_names=tuple(map(str, header["class_names"])),
        paths=PathList.of_block(tensors["paths"].tobytes(), ends),
        labels=columns["label"].astype(np.int64),
        shard=columns["shard"],
        offset=columns["offset"].astype(np.int64),
        size=columns["size"],
        crc32=columns["crc32"],
    )


def _problem(index: ShardIndex) -> str:
    """What does not fit together in an index; an empty text if all does."""
    if not len(index.labels):
        return "it has no image"
    if index.labels.min() < 0 or index.labels.max() >= len(index.class_names):
        return f"it has labels outside of 0 … {len(index.class_names) - 1}"
    if index.shard.min() < 0 or index.shard.max() >= len(index.shards):
        return f"it has images in more than its {len(index.shards)} shards"
    if wrong := next((shard.name for shard in index.shards if not is_plain_name(shard.name)), None):
        return f"a shard cannot be called {printable(wrong)}"
    sizes, ends = np.array([shard.size for shard in index.shards]), index.offset + index.size.astype(np.int64)
    if index.offset.min() < 0 or index.size.min() < 0 or (ends > sizes[index.shard]).any():
        return "it has images behind the end of their shards"
    return ""


def is_plain_name(name: str) -> bool:
    """Whether a name is that of a file in the folder of the index, and not of one elsewhere.

    Args:
        name: of a shard.
    """
    return bool(name) and name not in (".", "..") and PurePosixPath(name).name == name and "\0" not in name
