"""The products of a training step alone: matrix products, convolutions, fused attention, with the step's own tensors.

`python -m tailtune.benchmarks.steps.products JSON` answers the commands of `Side`, as `ours.py` does. The time of the
products is a floor for the step: whatever else it does comes on top.
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tailtune.benchmarks.step import make_step
from tailtune.benchmarks.steps.clock import Clock
from tailtune.benchmarks.steps.device import device
from tailtune.configs import load_configs
from tailtune.models import resolve
from tailtune.trainers.option_schema import declared
from tailtune.trainers.processes.kept_memory import keep_freed_memory

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "_linear_pointwise", "convolution", "convolution_backward")
"""Operators of products; beside them, all whose name contains `dot_product`."""


class Recorder(TorchDispatchMode):
    """Keeps every call of a product, with its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Sequence[Any], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS or "dot_product" in name:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def products_of(step: Callable[[], None]) -> Callable[[], None]:
    """A function that computes the products of a step again, and nothing else.

    Args:
        step: makes one training step. It is called twice.
    """
    step()
    with Recorder() as recorder:
        step()

    @torch.no_grad()
    def replay() -> None:
        for function, args, kwargs in recorder.calls:
            function(*args, **kwargs)

    return replay


def main(row: dict[str, Any]) -> None:
    """Compute the products of a step for each line of standard input.

    Args:
        row: as in `ours.main`.
    """
    clock = Clock()
    if device().type == "cpu":
        keep_freed_memory()
    cfg = resolve(load_configs(row["data"], row["model"], ["pretrained", "none", *row["pairs"]], declared())[-1])
    replay = products_of(make_step(cfg, row["prec"], row["batch"], device(), fast=True))
    for _ in clock.batches(None):
        replay()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
