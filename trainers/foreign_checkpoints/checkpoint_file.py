"""Opens checkpoint files of other projects. Code that a file may contain is not executed.

LIFT and its first version PEL save `tuner` and `head`. RIDE, SADE and BatchFormer save a `state_dict`.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.models.backbones.safe_torch_load import (
    READ_ERRORS,
    STATE_DICT_OF_SAVED,
    State,
    explain_read_error,
    refuse_bad_tensors,
    safe_torch_load,
)

LIFT_FILE = "checkpoint.pth.tar"
"""Name of LIFT's checkpoint file."""
BACKBONE = "backbone."
"""Prefix of the names of all tensors in checkpoints of RIDE and SADE."""
PARALLEL = "module."
"""Prefix that DataParallel adds to names."""

TUNER_AND_HEAD_OF_SAVED = "{part: s[part] for part in ('tuner', 'head')}"
"""Python expression that selects the needed parts of LIFT's saved object `s`."""


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
    def tensors(self) -> State:
        """Name → tensor: `tuner.…` and `head.…`, or `backbone.…`, without DataParallel's `module.`.

        Raises:
            UserError: the file cannot be opened, or does not contain only tensors.
        """
        try:
            content = safe_torch_load(self.path)
        except READ_ERRORS as error:
            keep = TUNER_AND_HEAD_OF_SAVED if self.kind == "lift" else STATE_DICT_OF_SAVED
            raise UserError(f"{self.path} {explain_read_error(self.path, error, keep)}") from error
        tensors = self._tensors_of(content if isinstance(content, dict) else {})
        refuse_bad_tensors(tensors, str(self.path))
        return tensors

    def _tensors_of(self, content: dict[Any, Any]) -> State:
        if _is_state_dict(content.get("tuner")) and _is_state_dict(content.get("head")):
            return {
                f"{part}.{name}": tensor
                for part in ("tuner", "head")
                for name, tensor in _without_parallel(content[part]).items()
            }
        state = content.get("state_dict", content)
        if _is_state_dict(state) and any(name.endswith("conv1.weight") for name in state):
            return {
                f"{BACKBONE}{name.removeprefix(BACKBONE)}": tensor for name, tensor in _without_parallel(state).items()
            }
        raise UserError(
            f"{self.path} is no checkpoint that can be read here: those of LIFT and PEL are state dicts 'tuner' and "
            "'head', those of RIDE and SADE a 'state_dict' of their networks"
        )


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    )


def _without_parallel(state: State) -> State:
    return {name.removeprefix(PARALLEL): tensor for name, tensor in state.items()}
