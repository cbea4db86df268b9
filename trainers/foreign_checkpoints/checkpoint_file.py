"""A checkpoint file of other people's code, opened without running what it may contain.

LIFT, and PEL, its first generation: `tuner` and `head`. RIDE, SADE, BatchFormer: a `state_dict` of their networks.
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
    STATE,
    State,
    explain_read_error,
    refuse_bad_tensors,
    safe_torch_load,
)

FILE = "checkpoint.pth.tar"
"""LIFT's name for it."""
BACKBONE = "backbone."
PARALLEL = "module."

LIFTS = "{part: s[part] for part in ('tuner', 'head')}"
"""What of LIFT's file, `s`, is needed, in Python."""


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A checkpoint file of LIFT, PEL, RIDE, SADE or BatchFormer."""

    path: Path

    @cached_property
    def digest(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    @property
    def kind(self) -> str:
        return "lift" if self.path.name == FILE else "file"

    @cached_property
    def tensors(self) -> State:
        """`tuner.…` and `head.…`, or `backbone.…` → tensor, without DataParallel's `module.`.

        Raises:
            UserError: it cannot be opened, or holds anything else than tensors.
        """
        try:
            content = safe_torch_load(self.path)
        except READ_ERRORS as error:
            raise UserError(
                f"{self.path} {explain_read_error(self.path, error, LIFTS if self.kind == 'lift' else STATE)}"
            ) from error
        tensors = self._of(content if isinstance(content, dict) else {})
        refuse_bad_tensors(tensors, str(self.path))
        return tensors

    def _of(self, content: dict[Any, Any]) -> State:
        if _is_state(content.get("tuner")) and _is_state(content.get("head")):
            return {
                f"{part}.{name}": each for part in ("tuner", "head") for name, each in _plain(content[part]).items()
            }
        state = content.get("state_dict", content)
        if _is_state(state) and any(name.endswith("conv1.weight") for name in state):
            return {f"{BACKBONE}{name.removeprefix(BACKBONE)}": each for name, each in _plain(state).items()}
        raise UserError(
            f"{self.path} is no checkpoint that can be read here: those of LIFT and PEL are state dicts 'tuner' and "
            "'head', those of RIDE and SADE a 'state_dict' of their networks"
        )


def _is_state(part: Any) -> bool:
    return isinstance(part, dict) and all(isinstance(k, str) and isinstance(each, Tensor) for k, each in part.items())


def _plain(state: State) -> State:
    return {name.removeprefix(PARALLEL): each for name, each in state.items()}
