"""A GPU that computes nothing: tensors that only say that they are there. It shows where devices are mixed, and where
Python would wait for the GPU to read a number from it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
PINNING = {"is_pinned": lambda tensor: False, "_pin_memory": lambda tensor: tensor}
"""Operators that need CUDA itself."""


class NumbersOnCpu(TorchDispatchMode):
    """Computes what has no tensor of the GPU really, so that random draws of the CPU have values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if stand_in := PINNING.get(func.overloadpacket.__name__):
            return stand_in(args[0])
        given = tree_leaves((args, kwargs))
        if any(isinstance(each, FakeTensor) or (isinstance(each, torch.device) and each == GPU) for each in given):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


@contextmanager
def fake_gpu() -> Iterator[FakeTensorMode]:
    """Tensors on `GPU` have no values here. Mixing them with a tensor of the CPU, or reading one, is an error."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, NumbersOnCpu():
        yield mode


def put(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the parameters and buffers of a module by such tensors."""
    known: dict[int, Tensor] = {}

    def there(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            found = mode.from_tensor(tensor.data).to(GPU)
            known[id(tensor)] = nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found
        return known[id(tensor)]

    for each in module.modules():
        for tensors in (each._parameters, each._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = there(tensor)
