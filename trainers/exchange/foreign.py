"""A checkpoint file of LIFT or of PEL, its first generation, opened without running what it may contain."""

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


@dataclass(frozen=True)
class Foreign:
    """A checkpoint file of LIFT or PEL."""

    path: Path

    @cached_property
    def digest(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    def read(self) -> dict[str, Tensor]:
        """`tuner.…` and `head.…` → tensor, without DataParallel's `module.`.

        Raises:
            UserError: it cannot be opened, or holds anything else than tensors.
        """
        try:
            content: Any = torch.load(self.path, map_location="cpu", weights_only=True)
        except READ_ERRORS as error:
            raise UserError(f"{self.path} {_reason(error)}") from error
        parts: list[Any] = [content.get(part) if isinstance(content, dict) else None for part in ("tuner", "head")]
        if not all(isinstance(part, dict) and all(isinstance(t, Tensor) for t in part.values()) for part in parts):
            raise UserError(f"{self.path} is no checkpoint of LIFT or PEL: it needs state dicts 'tuner' and 'head'")
        named = zip(("tuner", "head"), parts, strict=True)
        return {f"{part}.{name.removeprefix('module.')}": each for part, own in named for name, each in own.items()}


def _reason(error: Exception) -> str:
    """torch names what it refuses to unpickle as GLOBAL, somewhere below its advice to unpickle it all the same."""
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"holds {found[1]}, and nothing but tensors is unpickled, because it can run code: where it was made, save "
            "{'tuner': …, 'head': …} again with state dicts of tensors only"
        )
    if isinstance(error, PermissionError):
        return f"cannot be read: {error.strerror}"
    return "is damaged, or no file of torch.save; copy it again from where it was made"
