"""Images in tar shards, each of which is read by itself: an index says where it is.

So an image has a position, as in a list. The order of an epoch, augmentation, workers, processes and resuming do not
know of shards, and no process reads the images of another one.
"""

import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tailtune.datasets.images.image_files import DecodeError
from tailtune.datasets.images.inspect_files import Inspection
from tailtune.datasets.sources.named_source import MissingData, NamedSource
from tailtune.datasets.sources.shard_index import ShardIndex, WrongIndex, index_name, read_index
from tailtune.datasets.sources.shard_store import FolderStore, RemoteStore, ShardStore, Span

ABSENT = "not found: its shard is missing, copy it again"


class ShardSource(NamedSource):
    """The images of one split of a shard set.

    Args:
        store: reads the files of the set.
        index: says where each image is.
    """

    def __init__(self, store: ShardStore, index: ShardIndex) -> None:
        self.store, self.index = store, index
        self.paths, self.labels = index.paths, index.labels
        self._fetched: Mapping[int, bytes] = {}
        """Encoded images that `prefetch` has read, by position."""

    def location(self, index: int) -> str:
        """As `Source.location`: the shard, and the path of the image."""
        return f"{self.shard_location(index)}: {self.paths[index]}"

    def shard_location(self, index: int) -> str:
        """Path or address of the shard of an image.

        Args:
            index: position in the source.
        """
        return f"{self.store.where}/{self._shard_name(index)}"

    def file(self, index: int) -> BinaryIO:
        """As `NamedSource.file`.

        Raises:
            DecodeError: the shard is missing or cut short, or these bytes are not those that were indexed.
            MissingData: the server of the shards does not answer.
        """
        return io.BytesIO(self._content(index))

    def stamp(self, index: int) -> str:
        """As `Source.stamp`: path, size and checksum."""
        return f"{self.paths[index]} {self.index.size[index]} {self.index.crc32[index]}"

    def prefetch(self, indices: Sequence[int]) -> None:
        """As `NamedSource.prefetch`; only for shards that a server has."""
        if not self.store.remote:
            return
        wanted = [*dict.fromkeys(indices)]
        found = self.store.spans([self._span(index) for index in wanted])
        self._fetched = {index: each for index, each in zip(wanted, found, strict=True) if each is not None}

    def inspect(self, indices: np.ndarray, read_headers: bool) -> Inspection:
        """As `NamedSource.inspect`: the sizes of the shards are compared with the index, and no image is read."""
        problems_of = {number: problem for number, problem in enumerate(self.shard_problems()) if problem}
        sizes = self.index.size[indices].astype(np.int64)
        wrong = np.flatnonzero(np.isin(self.index.shard[indices], list(problems_of)))
        sizes[wrong] = -1
        return Inspection(sizes, {i: problems_of[int(self.index.shard[indices[i]])] for i in wrong.tolist()})

    def shard_problems(self) -> list[str]:
        """What is wrong with each shard, by its size; an empty text if nothing is.

        Raises:
            MissingData: the server of the shards does not answer.
        """
        sizes = self.store.sizes([shard.name for shard in self.index.shards])
        return [_size_problem(size, shard.size) for size, shard in zip(sizes, self.index.shards, strict=True)]

    def has(self, path: str) -> bool:
        """As `NamedSource.has`."""
        return self.paths.position(path) is not None

    def read(self, path: str) -> bytes:
        """As `NamedSource.read`."""
        position = self.paths.position(path)
        if position is None:
            raise FileNotFoundError(path)
        try:
            return self._content(position)
        except DecodeError as problem:
            raise OSError(str(problem)) from problem

    def _content(self, index: int) -> bytes:
        """The encoded image. A `DecodeError` says what is wrong with it or with its shard."""
        span = self._span(index)
        content = self._fetched.get(index)
        if content is None:
            try:
                content = self.store.span(span)
            except FileNotFoundError as error:
                raise DecodeError(ABSENT) from error
            except OSError as error:
                raise DecodeError(error.strerror or str(error)) from error
        if len(content) != span.size:
            raise DecodeError(f"{span.name} ends before the image does: copy it again")
        if zlib.crc32(content) != self.index.crc32[index]:
            raise DecodeError(f"its bytes are not those that were indexed: {span.name} is damaged or of another set")
        return content

    def _span(self, index: int) -> Span:
        return Span(self._shard_name(index), int(self.index.offset[index]), int(self.index.size[index]))

    def _shard_name(self, index: int) -> str:
        return self.index.shards[int(self.index.shard[index])].name


def _size_problem(found: int | None, expected: int) -> str:
    if found is None:
        return ABSENT
    if found not in (expected, -1):
        return (
            f"its shard has {found:,} bytes instead of {expected:,}: it is cut short or of another set, copy it again"
        )
    return ""


@dataclass(frozen=True)
class ShardSet:
    """The splits of a shard set."""

    class_names: tuple[str, ...]
    """C names in the order of the labels."""
    by_split: Mapping[str, ShardSource]
    """`train`, and `test` and `val` if they are there."""


def open_shards(root: Path | str) -> ShardSet:
    """Read the indexes of a shard set. No shard is opened.

    Args:
        root: the folder of the set, or its address as text.

    Raises:
        MissingData: the index of a split is missing, or the server does not answer.
        WrongIndex: an index is damaged, or is of another set than that of the training images.
    """
    store: ShardStore = RemoteStore(root) if isinstance(root, str) else FolderStore(root)
    train = _open_split(store, "train")
    by_split = {"train": train}
    by_split |= {split: _open_split(store, split) for split in train.index.splits if split in ("test", "val")}
    names = train.index.class_names
    for split, source in by_split.items():
        if source.index.class_names != names:
            raise WrongIndex(
                f"{store.where}/{index_name(split)} has other classes than {index_name('train')}: it is of another set"
            )
    return ShardSet(names, by_split)


def _open_split(store: ShardStore, split: str) -> ShardSource:
    where = f"{store.where}/{index_name(split)}"
    try:
        content = store.whole(index_name(split))
    except FileNotFoundError as error:
        remedy = "set `root` to the folder or address of the shards, which data shard writes"
        raise MissingData(f"index of the {split} shards not found: {where} ({remedy})") from error
    return ShardSource(store, read_index(content, where, split))
