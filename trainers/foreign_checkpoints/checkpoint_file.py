"""`ForeignCheckpoint`: the place and the identity of a checkpoint file of another project.

LIFT and its first version PEL save `tuner` and `head`. RIDE, SADE and BatchFormer save a `state_dict`.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tailtune.models.backbones.safe_torch_load import State

LIFT_FILE = "checkpoint.pth.tar"
"""Name of LIFT's checkpoint file."""
BACKBONE = "backbone."
"""Prefix of the names of all tensors in checkpoints of RIDE and SADE."""


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A checkpoint file of LIFT, PEL, RIDE, SADE or BatchFormer.

    Args:
        path: the file.
    """

    path: Path

    @cached_property
    def digest(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    @property
    def kind(self) -> str:
        """`lift` if the file has the name of LIFT's checkpoint, otherwise `file`."""
        return "lift" if self.path.name == LIFT_FILE else "file"

    @cached_property
    def tensors(self) -> "State":
        """Name → tensor, as `read_tensors` returns them. Raises `UserError` if the file is no checkpoint."""
        from tailtune.trainers.foreign_checkpoints.checkpoint_tensors import read_tensors  # imports torch

        return read_tensors(self)
