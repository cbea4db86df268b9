"""The images of all splits as one sequence. A path is made when it is asked for, to save memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image

from tailtune.datasets.sources.image_sources import FileSource
from tailtune.datasets.sources.named_source import NamedSource
from tailtune.datasets.splits.split_records import Split


class SplitFiles(Sequence[Path]):
    """N images, one split after another. As a sequence it gives the paths of files; images in shards have none.

    Args:
        splits: name of a split → its images, which are files or in shards.
        positions: which of the images of all splits this sequence has, int64 [N]; None for all.
    """

    def __init__(self, splits: Mapping[str, Split], positions: np.ndarray | None = None):
        self.by_name = dict(splits)
        self.names = list(splits)
        lengths = [len(split.indices) for split in splits.values()]
        self.positions = np.arange(sum(lengths)) if positions is None else positions
        self._starts = np.cumsum([0, *lengths])
        self.split_of = np.repeat(np.arange(len(lengths)), lengths)[self.positions]
        """Number of the split of each file, in the order of `names`, int64 [N]."""

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Path]: ...

    def __getitem__(self, index: int | slice) -> Path | Sequence[Path]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        source, position = self.source_of(index)
        assert isinstance(source, FileSource), "images in shards are no files"
        return source.root / source.paths[position]

    def source_of(self, index: int) -> tuple[NamedSource, int]:
        """The source of an image, and the position in it.

        Args:
            index: position in this sequence.
        """
        split_number = self.split_of[index]
        split = self.by_name[self.names[split_number]]
        assert isinstance(split.source, NamedSource)
        return split.source, int(split.indices[self.positions[index] - self._starts[split_number]])

    def decode(self, index: int) -> Image.Image:
        """An image in mode RGB.

        Args:
            index: position in this sequence.

        Raises:
            DecodeError: it is missing or cannot be decoded.
        """
        source, position = self.source_of(index)
        return source.decode(position)

    def relative(self, index: int) -> str:
        """The path of an image as the list, the class folder or the index gives it.

        Args:
            index: position in this sequence.
        """
        source, position = self.source_of(index)
        return source.paths[position]

    def split(self, index: int) -> str:
        """Name of the split of a file.

        Args:
            index: position in this sequence.
        """
        return self.names[self.split_of[index]]

    def location(self, index: int) -> str:
        """Where a file is and which line of a list names it, for messages.

        Args:
            index: position in this sequence.
        """
        source, position = self.source_of(index)
        return source.location(position)

    def take(self, positions: np.ndarray) -> "SplitFiles":
        """Some of the files.

        Args:
            positions: positions in this sequence, int64 [n].
        """
        return SplitFiles(self.by_name, self.positions[positions])
