"""A checkpoint file of other people's code, opened without running what it may contain.

LIFT, and PEL, its first generation: `tuner` and `head`. RIDE, SADE, BatchFormer: a `state_dict` of their networks.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from models.weights import READ_ERRORS

FILE = "checkpoint.pth.tar"
"""LIFT's name for it."""
BACKBONE = "backbone."
PARALLEL = "module."

State = dict[str, Tensor]


@dataclass(frozen=True)
class Foreign:
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
            content: Any = torch.load(self.path, map_location="cpu", weights_only=True)
        except READ_ERRORS as error:
            raise UserError(f"{self.path} {self._reason(error)}") from error
        content = content if isinstance(content, dict) else {}
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

    def _reason(self, error: Exception) -> str:
        """torch names what it refuses to unpickle as GLOBAL, somewhere below its advice to unpickle it all the same."""
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            held = (
                f"holds {found[1]}, and nothing but tensors is unpickled, because it can run code: where it was made, "
            )
            if self.kind == "lift":
                return held + "save {'tuner': …, 'head': …} again with state dicts of tensors only"
            save, load = "torch.save", "torch.load"  # for people to run; nothing here does
            state = f"{load}('{self.path.name}', map_location='cpu', weights_only={False})['state_dict']"
            return f"{held}run python -c \"import torch; {save}({{'state_dict': {state}}}, 'weights.pth')\""
        if isinstance(error, PermissionError):
            return f"cannot be read: {error.strerror}"
        return "is damaged, or no file of torch.save; copy it again from where it was made"


def _is_state(part: Any) -> bool:
    return isinstance(part, dict) and all(isinstance(k, str) and isinstance(each, Tensor) for k, each in part.items())


def _plain(state: State) -> State:
    return {name.removeprefix(PARALLEL): each for name, each in state.items()}
