"""`Earlier`: the finished run that a run continues, as the method of the following run sees it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from tailtune.trainers.methods.base import Method


@dataclass(frozen=True)
class Earlier:
    """The finished run that the option `after` names."""

    fresh: bool
    """Whether the following run has just begun. If False it resumes, and its state already holds what it took over."""
    tensors: Callable[[], dict[str, Tensor]]
    """→ tensors that the earlier run trained, by name. Raises a `UserError` if its base model or classes differ."""
    method: Callable[[], "Method"]
    """→ the trained method of the earlier run: frozen, in eval mode, on the device."""
