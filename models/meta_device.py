"""`on_meta_device`: builds modules that have shapes only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

RANDOM_FILLS: tuple[Callable[..., Any], ...] = (Tensor.normal_, Tensor.uniform_)


class _WithoutRandomFills(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RANDOM_FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Within the block, new tensors have a shape and no values, and weights are not initialised.

    `torch.device("meta")` alone would also give such tensors. But PyTorch then computes the shape of a random fill by
    code of its compiler, whose import takes as long as that of torch.
    """
    with torch.device("meta"), _WithoutRandomFills():
        yield
