"""`Embeddings`: features of images, which are collected in their order and written as one safetensors file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailtune.trainers.storage.large_tensors import Scratch
from tailtune.trainers.storage.tensor_files import stream_tensors

ROWS_AT_ONCE = 4096


class Embeddings:
    """Features of images. Many of them lie in a temporary file beside the final one.

    Args:
        path: the final file.
        most: the largest number of images.
    """

    def __init__(self, path: Path, most: int) -> None:
        self.path, self.most, self.count = path, most, 0
        self._rows: Any = None

    def add(self, features: Tensor) -> None:
        """Add the features of the next images, fp32 [B, …], on the CPU."""
        if self._rows is None:
            folder = next(folder for folder in self.path.absolute().parents if folder.is_dir())
            self._rows = Scratch(folder).empty((self.most, *features.shape[1:]))
        self._rows[self.count : self.count + len(features)] = features
        self.count += len(features)

    def write(self, about: dict[str, Any]) -> None:
        """Write the tensor `embeddings` [N, …] of the N images that were added.

        Args:
            about: what the metadata entry `about` holds, as JSON.

        Raises:
            UserError: the file system refuses to write.
        """
        shape = (self.count, *self._rows.shape[1:])
        stream_tensors(self.path, {"embeddings": (torch.float32, shape, self._parts())}, json.dumps(about))

    def _parts(self) -> Iterator[Tensor]:
        for first in range(0, self.count, ROWS_AT_ONCE):
            yield self._rows[first : min(first + ROWS_AT_ONCE, self.count)]
