"""Writes the images of one split as tar files in the format of WebDataset, and makes their index.

The tar files are the same, byte for byte, whenever they are written: they hold no times, owners or rights.
"""

import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from tailtune.configs.atomic_file import atomic_file
from tailtune.datasets.images.image_files import FORMATS, HEADER_BYTES, format_of
from tailtune.datasets.sources.named_source import BadImage, NamedSource
from tailtune.datasets.sources.shard_index import Shard, ShardIndex

READ_AT_ONCE = 64
"""Images that are in memory at the same time."""
THREADS = 8
"""Threads that read image files. They may be more than the processors, because they mostly wait."""
END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)


class _Sample(NamedTuple):
    """An image and its label, as they stand in a tar file."""

    position: int
    """Position in the source."""
    blocks: bytes
    """The two members with their headers."""
    offset: int
    """Where the encoded image begins in `blocks`."""
    size: int
    """Size of the encoded image."""
    crc32: int


def write_shards(
    source: NamedSource, folder: Path, split: str, splits: Sequence[str], class_names: Sequence[str], max_bytes: int
) -> ShardIndex:
    """Write all images of a source. An image that is listed several times is written once.

    Args:
        source: the images. Their encoded bytes are copied.
        folder: the folder of the shards.
        split: name of the split, with which the names of the shards begin.
        splits: all splits of the set.
        class_names: C names in the order of the labels.
        max_bytes: size that a shard has at most, unless a single image is larger.

    Returns:
        The index of the shards, which is not written.

    Raises:
        BadImage: an image cannot be read.
        OSError: the file system refuses to write.
    """
    position_of: dict[str, int] = {}
    first = np.array([position_of.setdefault(path, i) for i, path in enumerate(source.paths)], dtype=np.int64)
    rows = np.zeros((len(source), 4), dtype=np.int64)  # shard, offset, size, CRC-32
    shards: list[Shard] = []
    samples = _samples(source, [*position_of.values()], split)
    sample = next(samples, None)
    while sample is not None:
        name = f"{split}-{len(shards):05d}.tar"
        with atomic_file(folder / name) as file:
            at = 0
            while sample is not None and (at == 0 or at + len(sample.blocks) + len(END_OF_TAR) <= max_bytes):
                rows[sample.position] = len(shards), at + sample.offset, sample.size, sample.crc32
                at += file.write(sample.blocks)
                sample = next(samples, None)
            at += file.write(END_OF_TAR)
        shards.append(Shard(name, at))
    shard, offset, size, crc32 = rows[first].T
    return ShardIndex(
        split, shards, tuple(splits), tuple(class_names), source.paths, source.labels, shard, offset, size, crc32
    )


def _samples(source: NamedSource, positions: Sequence[int], split: str) -> Iterator[_Sample]:
    """The images at some positions, with names that occur once."""
    keys: set[str] = set()
    with (
        tqdm(total=len(positions), desc=f"writing {split}", delay=2, leave=False, unit="image", disable=None) as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        for start in range(0, len(positions), READ_AT_ONCE):
            chunk = positions[start : start + READ_AT_ONCE]
            for position, content in zip(chunk, pool.map(source.encoded, chunk), strict=True):
                kind = format_of(content[:HEADER_BYTES])
                if kind is None:
                    raise BadImage(f"{source.location(position)} has changed: it is no image any more")
                key = _new_key(source.paths[position], keys)
                image = _member(f"{key}{FORMATS[kind][0]}", content)
                label = _member(f"{key}.cls", str(int(source.labels[position])).encode())
                yield _Sample(position, b"".join([*image, *label]), len(image[0]), len(content), zlib.crc32(content))
            bar.update(len(chunk))


def _new_key(path: str, keys: set[str]) -> str:
    """The name of a path in tar files, without extension. A dot would begin the extension, and `..` is unsafe."""
    parts = [part.replace("..", "_") for part in PurePosixPath(path.lstrip("/")).parts]
    stem = PurePosixPath(parts[-1]).stem.replace(".", "_") or "_"
    base = key = "/".join([*parts[:-1], stem])
    number = 1
    while key in keys:
        number += 1
        key = f"{base}_{number}"
    keys.add(key)
    return key


def _member(name: str, content: bytes) -> tuple[bytes, bytes, bytes]:
    """Header, content and padding of a member of a tar file."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    padding = bytes(-len(content) % tarfile.BLOCKSIZE)
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"), content, padding
