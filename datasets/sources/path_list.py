"""`PathList`: many paths in one block of bytes, which every process of a run can share."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np


class PathList(Sequence[str]):
    """An unchangeable sequence of N paths.

    A list of texts takes about 60 bytes more for each path. It is also copied into every process that decodes images,
    because Python counts the references to each text inside of it.

    Args:
        paths: the paths. Bytes of file names that are no UTF-8 are kept, as `os.fsdecode` gives them.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        block, ends = bytearray(), array("q", [0])
        for path in paths:
            block += path.encode(errors="surrogateescape")
            ends.append(len(block))
        self._block = bytes(block)
        self._ends = np.array(ends, dtype=np.uint32 if len(block) < 2**32 else np.int64)  # [N + 1]
        self._order: np.ndarray | None = None
        """Positions in the block of this view's paths, int64 [N]; None: all, in their order."""

    @classmethod
    def of_block(cls, block: bytes, ends: np.ndarray) -> "PathList":
        """The paths that `packed` gave.

        Args:
            block: the bytes of all paths.
            ends: where each path begins, and the last one ends, unsigned, in ascending order, [N + 1].
        """
        paths = cls(())
        paths._block, paths._ends = block, ends
        return paths

    def packed(self) -> tuple[bytes, np.ndarray]:
        """The paths as one block of bytes; and where each begins and the last one ends, [N + 1]."""
        whole = self if self._order is None else PathList(self)
        return whole._block, whole._ends

    def position(self, path: str) -> int | None:
        """The first position of a path; None if it is not there. It takes a search through all bytes.

        Args:
            path: any text.
        """
        block, ends = self.packed()
        wanted, start = path.encode(errors="surrogateescape"), 0
        while wanted and (start := block.find(wanted, start)) >= 0:
            place = int(np.searchsorted(ends, start, side="right")) - 1
            if ends[place] == start and ends[place + 1] == start + len(wanted):
                return place
            start += 1
        return None

    def at(self, positions: np.ndarray) -> "PathList":
        """A view of some of the paths, which shares the block.

        Args:
            positions: positions in this sequence, int64 [n].
        """
        assert not len(positions) or positions.min() >= 0, "−1 stands for a missing path"
        view = PathList.__new__(PathList)
        view._block, view._ends = self._block, self._ends
        view._order = positions if self._order is None else self._order[positions]
        return view

    def __len__(self) -> int:
        return len(self._ends) - 1 if self._order is None else len(self._order)

    @overload
    def __getitem__(self, position: int) -> str: ...

    @overload
    def __getitem__(self, position: slice) -> "PathList": ...

    def __getitem__(self, position: int | slice) -> "str | PathList":
        if isinstance(position, slice):
            return self.at(np.arange(len(self))[position])
        if not -len(self) <= position < len(self):
            raise IndexError(f"position {position} of {len(self)} paths")
        place = position % len(self) if self._order is None else self._order[position]
        return self._block[self._ends[place] : self._ends[place + 1]].decode(errors="surrogateescape")

    def __iter__(self) -> Iterator[str]:
        starts = self._ends[:-1] if self._order is None else self._ends[self._order]
        ends = self._ends[1:] if self._order is None else self._ends[self._order + 1]
        places = zip(starts.tolist(), ends.tolist(), strict=True)
        return (self._block[start:end].decode(errors="surrogateescape") for start, end in places)

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str) or len(self) != len(other):
            return False
        return all(path == item for path, item in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"PathList({[*self[:3]]} …, {len(self)} paths)" if len(self) > 3 else f"PathList({[*self]})"
