"""Tensors that may be larger than memory: large ones lie in files, from which some rows are read at a time."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from tailtune.configs.errors import UserError

IN_MEMORY = 2**24
"""Number of elements up to which a tensor is kept in memory."""


class FileTensor:
    """A tensor [N, …] in a file. Rows are read and written as those of a tensor are: `tensor[rows]`.

    The rows are copied by `read` and `write`. If the file were mapped into memory instead, reading rows in random order
    would keep all of it there: Linux maps up to 2 MB around each of them.

    Args:
        file: the open file, without a buffer of Python. The tensor keeps it open.
        shape: shape of the tensor.
        dtype: dtype of the tensor.
        offset: position of the tensor in the file, in bytes.
    """

    def __init__(self, file: IO[bytes], shape: Sequence[int], dtype: torch.dtype, offset: int = 0) -> None:
        self._file, self._offset = file, offset
        self._row_bytes = prod(shape[1:]) * dtype.itemsize
        self.shape, self.dtype = torch.Size(shape), dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        runs = list(self._runs(rows))
        found = torch.empty(sum(count for _, count in runs), *self.shape[1:], dtype=self.dtype)
        content, done = found.view(-1).view(torch.uint8).numpy().data, 0
        for first, count in runs:
            self._file.seek(self._offset + first * self._row_bytes)
            end = done + count * self._row_bytes
            while done < end:
                read = self._file.readinto(content[done:end])  # type: ignore[attr-defined]
                if not read:
                    raise UserError("a file with tensors was cut off while it was read; start the command again")
                done += read
        return found

    def __setitem__(self, rows: slice | Tensor, values: Tensor) -> None:
        content, done = values.to(self.dtype).contiguous().view(-1).view(torch.uint8).numpy().data, 0
        for first, count in self._runs(rows):
            self._file.seek(self._offset + first * self._row_bytes)
            end = done + count * self._row_bytes
            while done < end:
                done += self._file.write(content[done:end])

    def _runs(self, rows: slice | Tensor) -> Iterator[tuple[int, int]]:
        """First row and length of each run of consecutive rows."""
        if isinstance(rows, slice):
            first, end, step = rows.indices(len(self))
            assert step == 1
            yield first, max(0, end - first)
            return
        positions = rows.numpy()
        for run in np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1):
            if len(run):
                assert run[0] >= 0 and run[-1] < len(self)
                yield int(run[0]), len(run)


@dataclass(frozen=True)
class Scratch:
    """Gives room for tensors that are needed for a while: in memory, or in a temporary file if they are large."""

    folder: Path | None = None
    """Folder of the temporary files; None: that of the system, which is often in memory."""

    def is_large(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape is kept in a file."""
        return prod(shape) > IN_MEMORY

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Any:
        """A tensor to be filled: a `Tensor`, or a `FileTensor` if it is large.

        The file has no name, so nothing is left of it when the process ends, in whatever way.

        Raises:
            UserError: there is too little free space for the file.
        """
        if not self.is_large(shape):
            return torch.empty(*shape, dtype=dtype)
        size = prod(shape) * dtype.itemsize
        try:
            file = tempfile.TemporaryFile(buffering=0, dir=self.folder)  # noqa: SIM115
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is found before the images are read
            return FileTensor(file, shape, dtype)
        except OSError as error:
            raise UserError(
                f"cannot write {size / 1e9:.1f} GB of logits to {self.folder or tempfile.gettempdir()}: "
                f"{error.strerror}; free the space or choose another output_dir"
            ) from error
