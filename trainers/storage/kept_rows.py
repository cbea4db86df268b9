"""`KeptRows`: tensors that take long to compute and are too large for the memory, in a folder of limited size.

An entry is a safetensors file, of which a few rows are read at a time, and a small file with its checksum, which is
written last. As in `KeptTensors`, the name is a digest of everything that the tensor depends on.
"""

import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailtune.configs.machine import LARGEST_SHARE
from tailtune.trainers.storage.atomic_io import CannotWrite, Damaged, Digest, write_json
from tailtune.trainers.storage.kept_tensors import TENSOR, KeptTensors, as_text
from tailtune.trainers.storage.large_tensors import FileTensor
from tailtune.trainers.storage.tensor_files import open_tensors, stream_tensors

log = logging.getLogger("tailtune")


class KeptRows:
    """Tensors in a folder.

    Args:
        folder: the folder, which is made when the first entry is written.
        limit: the most bytes that all entries together may take.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = folder, limit
        self._names = KeptTensors(folder)

    def open(self, facts: Mapping[str, Any]) -> FileTensor | None:
        """The tensor of an entry, whose rows are read when they are used; None if no complete and unchanged one exists.

        Args:
            facts: everything that the tensor depends on, as JSON.
        """
        path = self._names.path(facts)
        checksum = path.with_suffix(".json")
        try:
            if not checksum.exists():
                return None
            Digest(**json.loads(checksum.read_text(encoding="utf-8"))).check(path)
            tensors, about = open_tensors(path)
            if about != as_text(facts):
                raise ValueError("it belongs to something else")
            return tensors[TENSOR]
        except (OSError, ValueError, KeyError, TypeError, Damaged) as error:
            damaged = error if isinstance(error, Damaged) else Damaged(path, str(error))
            log.warning("warning: %s; it is computed again", damaged)
            return None

    def write(
        self, facts: Mapping[str, Any], dtype: torch.dtype, shape: Sequence[int], parts: Iterable[Tensor]
    ) -> str | None:
        """Write an entry completely or not at all.

        Args:
            facts: as for `open`.
            dtype: dtype of the tensor.
            shape: shape of the tensor.
            parts: its rows, one part after another, on the CPU. They are made only if there is room.

        Returns:
            Why it is not written; None if it is.
        """
        path = self._names.path(facts)
        try:
            if lacks := self._lacks_room(path, prod(shape) * dtype.itemsize):
                return lacks
            self._names.remove_abandoned(path)
            digest = stream_tensors(path, {TENSOR: (dtype, shape, parts)}, as_text(facts))
            write_json(path.with_suffix(".json"), digest._asdict())
        except (OSError, CannotWrite) as error:
            refused = error.__cause__ if isinstance(error, CannotWrite) else error
            return f"cannot write {path}: {getattr(refused, 'strerror', refused)}"
        return None

    def _lacks_room(self, path: Path, size: int) -> str | None:
        """Why a file of `size` bytes has no room; None if it has."""
        folder, takes = self.folder, f"they take {size / 1e9:.3g} GB"
        left = max(0.0, self.limit - sum(_size(each) for each in folder.glob("*") if each != path))
        if size > left:
            limit = f"feature_cache_gb leaves {left / 1e9:.3g} of {self.limit / 1e9:.3g} GB in {folder}"
            return f"{takes}, and {limit}; delete old files there, or raise it"
        existing = next(each for each in (folder, *folder.parents) if each.is_dir())
        free = shutil.disk_usage(existing).free
        return None if size <= LARGEST_SHARE * free else f"{takes}, and {free / 1e9:.3g} GB are free for {folder}"


def _size(path: Path) -> int:
    """Bytes of a file; 0 if another process has removed or renamed it."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
