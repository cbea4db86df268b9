"""Tensors that may be larger than memory: large ones lie in files, of which only the parts in use are in memory."""

import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tailtune.configs.errors import UserError

IN_MEMORY = 2**24
"""Number of elements up to which a tensor is kept in memory."""
MAPPED_BYTES = 2**26
"""Number of bytes of a file that are mapped into memory before they are released again."""


class MappedTensor:
    """A tensor [N, …] in a file. It is read and written by its rows, as a tensor is: `tensor[rows]`.

    The memory of the process does not grow with the tensor: after every `MAPPED_BYTES`, the pages that were read or
    written are released. The operating system keeps them in its cache as long as it has free memory.

    Args:
        file: the open file. It must have its full size, and it may be closed afterwards.
        shape: shape of the tensor.
        dtype: dtype of the tensor.
        offset: position of the tensor in the file, in bytes.
        writable: whether rows may be written. If not, the file is never changed.
    """

    def __init__(
        self, file: BinaryIO, shape: Sequence[int], dtype: torch.dtype, offset: int = 0, writable: bool = False
    ) -> None:
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY  # torch warns of buffers that are read-only
        size = offset + prod(shape) * dtype.itemsize
        self._map = mmap.mmap(file.fileno(), size, access=access)
        self._tensor = torch.frombuffer(self._map, dtype=dtype, count=prod(shape), offset=offset).view(*shape)
        self._mapped = 0
        self.shape, self.dtype = torch.Size(shape), dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        self._count(rows)
        return self._tensor[rows]

    def __setitem__(self, rows: slice | Tensor, values: Tensor) -> None:
        self._count(rows)
        self._tensor[rows] = values

    def _count(self, rows: slice | Tensor) -> None:
        """Release the pages that earlier calls have mapped, if these and the given rows are too many."""
        number = len(range(*rows.indices(len(self)))) if isinstance(rows, slice) else len(rows)
        self._mapped += number * prod(self.shape[1:]) * self.dtype.itemsize
        if self._mapped > MAPPED_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)  # what was written stays in the file; views of it are still valid
            self._mapped = 0


@dataclass(frozen=True)
class Scratch:
    """Gives room for tensors that are needed for a while: in memory, or in a temporary file if they are large."""

    folder: Path | None = None
    """Folder of the temporary files; None: that of the system, which is often in memory."""

    def is_large(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape is kept in a file."""
        return prod(shape) > IN_MEMORY

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Any:
        """A tensor to be filled: a `Tensor`, or a `MappedTensor` if it is large.

        The file has no name, so nothing is left of it when the process ends, in whatever way.

        Raises:
            UserError: there is too little free space for the file.
        """
        if not self.is_large(shape):
            return torch.empty(*shape, dtype=dtype)
        size = prod(shape) * dtype.itemsize
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                if hasattr(
                    os, "posix_fallocate"
                ):  # a page without space on the disk would end the process when written
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                return MappedTensor(file, shape, dtype, writable=True)
        except OSError as error:
            raise UserError(
                f"cannot write {size / 1e9:.1f} GB of logits to {self.folder or tempfile.gettempdir()}: "
                f"{error.strerror}; free the space or choose another output_dir"
            ) from error
