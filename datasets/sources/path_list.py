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

    def at(self, positions: np.ndarray) -> "PathList":
        """A view of some of the paths, which shares the block.

        Args:
            positions: positions in this sequence, int64 [n].
        """
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
        order = range(len(self)) if self._order is None else self._order.tolist()
        ends = self._ends.tolist()
        return (self._block[ends[place] : ends[place + 1]].decode(errors="surrogateescape") for place in order)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"PathList({[*self[:3]]} …, {len(self)} paths)" if len(self) > 3 else f"PathList({[*self]})"
