"""`grad_checkpoint`: parts of a network whose activations are computed again in the backward pass, and not kept.

Chen et al. 2016 (arXiv:1604.06174). Of such a part only the input stays in memory until its backward pass.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint, noop_context_fn

RunPart = Callable[..., Any]
"""(function, modules whose parameters and batch norms it uses, inputs …) → what the function returns."""


def computed_again(run: Callable[..., Any], modules: Sequence[nn.Module], *inputs: Any) -> Any:
    """Call a function now, and again in the backward pass, with the same result.

    The second call repeats the random numbers of the first one, and leaves the running statistics of batch norms as
    they are. Nothing is computed again where nothing trains.

    Args:
        run: the function; it computes the same whenever it is called.
        modules: those whose parameters and batch norms it uses.
        inputs: its arguments.
    """
    used = [*inputs, *(parameter for module in modules for parameter in module.parameters())]
    if not torch.is_grad_enabled() or not any(isinstance(each, Tensor) and each.requires_grad for each in used):
        return run(*inputs)
    norms = [norm for module in modules for norm in batch_norms(module) if norm.training]
    contexts = (lambda: (nullcontext(), StatisticsKept(norms))) if norms else noop_context_fn
    return checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts)


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch norms within a module."""
    return [each for each in module.modules() if isinstance(each, _BatchNorm)]


class StatisticsKept(AbstractContextManager[None]):
    """Within this block, batch norms update copies of their running statistics. It can be entered several times.

    Args:
        norms: the batch norms.
    """

    def __init__(self, norms: Sequence[_BatchNorm]) -> None:
        self.norms = norms
        self.before: list[dict[str, Tensor | None]] = []

    def __enter__(self) -> None:
        self.before = [dict(norm._buffers) for norm in self.norms]
        for norm in self.norms:
            copies = {name: None if buffer is None else buffer.clone() for name, buffer in norm._buffers.items()}
            norm._buffers.update(copies)

    def __exit__(self, *_: object) -> None:
        for norm, buffers in zip(self.norms, self.before, strict=True):
            norm._buffers.update(buffers)
