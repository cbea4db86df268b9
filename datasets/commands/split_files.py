"""The image files of all splits as one sequence. A path is made when it is asked for, to save memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from tailtune.datasets.sources.image_sources import FileSource
from tailtune.datasets.splits.split_records import Split


class SplitFiles(Sequence[Path]):
    """N image files, one split after another.

    Args:
        splits: name of a split → its images, which are files.
        positions: which of the files of all splits this sequence has, int64 [N]; None for all.
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
        return self._source(index).root / self.relative(index)

    def relative(self, index: int) -> str:
        """The path of a file as the list or the class folder gives it.

        Args:
            index: position in this sequence.
        """
        return self._source(index).paths[self._in_source(index)]

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
        return self._source(index).location(self._in_source(index))

    def take(self, positions: np.ndarray) -> "SplitFiles":
        """Some of the files.

        Args:
            positions: positions in this sequence, int64 [n].
        """
        return SplitFiles(self.by_name, self.positions[positions])

    def _source(self, index: int) -> FileSource:
        source = self.by_name[self.split(index)].source
        assert isinstance(source, FileSource)
        return source

    def _in_source(self, index: int) -> int:
        split_number = self.split_of[index]
        within = self.positions[index] - self._starts[split_number]
        return int(self.by_name[self.names[split_number]].indices[within])
