"""How many bytes the collectives of torch.distributed bring to this process."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

ARRIVES: dict[str, Callable[..., Any]] = {
    "all_gather": lambda found, own, **_: found,
    "all_gather_into_tensor": lambda found, own, **_: found,
    "all_reduce": lambda tensor, *_, **__: tensor,
    "broadcast": lambda tensor, *_, **__: tensor,
    "gather": lambda own, found=None, *_, **__: found,
    "recv": lambda tensor, *_, **__: tensor,
    "reduce": lambda tensor, *_, **__: tensor,
    "scatter": lambda tensor, *_, **__: tensor,
}
"""Collective → the tensors among its arguments into which something of another process is written."""


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """In the block, the bytes that arrive at this process are added up, by collective. Those within DDP are not."""
    received = dict.fromkeys(ARRIVES, 0)

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            found = ARRIVES[name](*args, **named)
            tensors = [found] if isinstance(found, Tensor) else found or []
            received[name] += sum(each.numel() * each.element_size() for each in tensors)
            return original(*args, **named)

        return call

    with ExitStack() as patches:
        for name in ARRIVES:
            original = getattr(dist, name)
            for module in (dist, torch.distributed.distributed_c10d):
                patches.enter_context(mock.patch.object(module, name, watched(name, original)))
        yield received
