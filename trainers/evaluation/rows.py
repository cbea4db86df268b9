"""`Rows`: large arrays of logits that are read a few rows at a time."""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from tailtune.trainers.storage.large_tensors import FileTensor, Scratch

CHUNK_ELEMENTS = 2**18
"""Number of logits that are converted or computed at once. More of them would not be faster."""


class Rows(Protocol):
    """What a tensor [N, …], `HalfRows` and `MadeRows` have in common."""

    @property
    def shape(self) -> torch.Size:
        """The shape of all rows together."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows that are read."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any) -> Tensor:
        """Some rows: of a slice, or at given positions int64 [n]."""


def slices(rows: Rows, at_once: int | None = None) -> Iterator[slice]:
    """Slices of consecutive rows that together are all rows.

    Args:
        rows: the rows.
        at_once: number of elements of the rows of a slice; a slice has at least one row. None: `CHUNK_ELEMENTS`.
    """
    step = max(1, (at_once or CHUNK_ELEMENTS) // max(1, prod(rows.shape[1:])))
    return (slice(first, min(first + step, len(rows))) for first in range(0, len(rows), step))


class MadeRows:
    """Rows that are computed whenever they are read.

    Args:
        shape: the shape of all rows together.
        make: positions int64 [n] → these rows.
        dtype: the dtype of the rows.
    """

    def __init__(
        self, shape: tuple[int, ...], make: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32
    ) -> None:
        self.shape, self.dtype, self._make = torch.Size(shape), dtype, make

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Tensor:
        return self._make(torch.arange(len(self))[rows])


class HalfRows:
    """Logits [N, …, C] in half precision, as in files: differences from the maximum of each row in fp16, which is fp32.

    Args:
        differences: fp16 [M, …, C].
        row_max: fp32 [M, …].
        chosen: positions of the N rows among the M rows, int64 [N]; None: all.
    """

    dtype = torch.float32

    def __init__(self, differences: Tensor | FileTensor, row_max: Tensor, chosen: Tensor | None = None) -> None:
        self._differences, self._row_max, self._chosen = differences, row_max, chosen
        count = len(row_max) if chosen is None else len(chosen)
        self.shape = torch.Size((count, *differences.shape[1:]))

    @classmethod
    def empty(cls, shape: tuple[int, ...], scratch: Scratch) -> "HalfRows":
        """Room for logits of a shape."""
        return cls(scratch.empty(shape, torch.float16), torch.empty(shape[:-1]))

    @classmethod
    def of(cls, logits: Rows) -> "HalfRows":
        """Logits in half precision; those that are so already are not copied."""
        if isinstance(logits, HalfRows):
            return logits
        half = cls.empty(tuple(logits.shape), Scratch())
        for part in slices(logits):
            half[part] = logits[part]
        return half

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Tensor:
        differences, row_max = self.stored(rows)
        return differences.float().add_(row_max.unsqueeze(-1))

    def __setitem__(self, rows: Any, logits: Tensor) -> None:
        differences = torch.empty(logits.shape, dtype=torch.float16)
        row_max = logits.amax(-1, keepdim=True)
        for part in slices(logits):
            differences[part] = (logits[part] - row_max[part]).clamp_min_(torch.finfo(torch.float16).min)
        self._differences[rows], self._row_max[rows] = differences, row_max.squeeze(-1)

    def stored(self, rows: Any) -> tuple[Tensor, Tensor]:
        """The differences fp16 [n, …, C] and the maxima fp32 [n, …] of some rows."""
        if self._chosen is not None:
            rows = self._chosen[rows]
        return self._differences[rows], self._row_max[rows]

    def at(self, chosen: Tensor) -> "HalfRows":
        """The rows at some positions int64 [n]. Nothing is copied."""
        return HalfRows(self._differences, self._row_max, chosen if self._chosen is None else self._chosen[chosen])
