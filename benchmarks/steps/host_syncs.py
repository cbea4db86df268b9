"""Where a training step makes the host wait for the device; no GPU is needed.

    python -m tailtune.benchmarks.steps.host_syncs imagenet_lt clip_vit_b16_peft lora True

The step runs on the meta device, which stands for the GPU: PyTorch shows there, too, where a value of a tensor is read,
where the size of a result depends on values, and what is copied between host and device. A copy counts unless it is
asynchronous (`non_blocking`). What a CUDA kernel does inside is not seen.
"""

import argparse
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tailtune.benchmarks.steps.ours import fit
from tailtune.benchmarks.steps.side import ROOT
from tailtune.configs import CfgNode, load_configs
from tailtune.main import Parser, exit_code_of
from tailtune.models import resolve
from tailtune.trainers.distributed import Devices, make_accelerator
from tailtune.trainers.dry_run_report import ready_to_train
from tailtune.trainers.memory_estimate import blank_batch
from tailtune.trainers.methods.base import Batch
from tailtune.trainers.option_schema import declared
from tailtune.trainers.runs.load_run import outline

READS = ("_local_scalar_dense", "equal")
"""Operators that return values of tensors."""
SIZED_BY_VALUES = ("nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount")
"""Operators whose result has a size that the host has to know."""
FROM_LISTS = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
"""Functions that make a tensor on the host and then copy it."""
PACKAGES = "site-packages"
META = torch.device("meta")
IMAGES = 4
"""Images of a step."""


class HostSyncs(TorchDispatchMode):
    """Notes each operation for which the host waits.

    Args:
        device: the device that the host would wait for: the meta device, or the CPU, of which only reads are noted.

    Attributes:
        found: the operations so far with the line that called them, such as `nonzero, trainers/losses.py:12`.
    """

    def __init__(self, device: torch.device = META) -> None:
        super().__init__()
        self.device = device
        self.found: list[str] = []
        self._functions = _Functions(self)

    def __enter__(self) -> Self:
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options, name = kwargs or {}, func.overloadpacket.__name__
        if not self._waits(name, args, options):
            return func(*args, **options)
        self.note(name)
        if self.device == META and name in READS:
            return torch.zeros((), dtype=args[0].dtype).item()
        if self.device == META and name == "_to_copy":  # what leaves the meta device has no values
            return torch.zeros_like(args[0], dtype=options.get("dtype"), device=options["device"])
        return func(*args, **options)

    def note(self, name: str) -> None:
        """Note an operation of the line of this project that runs now."""
        places = [each for each in traceback.extract_stack() if each.filename != __file__]
        *_, last = (
            each for each in places if Path(each.filename).is_relative_to(ROOT) and PACKAGES not in each.filename
        )
        self.found.append(f"{name}, {Path(last.filename).relative_to(ROOT)}:{last.lineno}")

    def _waits(self, name: str, args: Any, options: dict[str, Any]) -> bool:
        tensors = [each for each in tree_leaves((args, options)) if isinstance(each, Tensor)]
        if name == "_to_copy":
            return self._is_blocking_copy(options.get("device"), tensors[0].device, options.get("non_blocking"))
        if not any(each.device == self.device for each in tensors):
            return False
        if name == "copy_":
            return self._is_blocking_copy(args[0].device, args[1].device, (*args, False)[2])
        if name in ("index", "index_put_", "index_put"):
            given = [each for each in args[1] if each is not None]
            is_fill = name != "index" and args[2].numel() == 1  # PyTorch makes a masked_fill of it
            masks = any(each.dtype in (torch.bool, torch.uint8) for each in given)
            return masks and not is_fill or any(each.device != args[0].device for each in given)
        sized = name in SIZED_BY_VALUES or name == "repeat_interleave" and options.get("output_size") is None
        return sized or name in READS

    def _is_blocking_copy(self, to: torch.device | None, of: torch.device, non_blocking: bool | None) -> bool:
        """Whether a copy is one between host and device that the host waits for."""
        return to is not None and to != of and self.device in (to, of) and not non_blocking


class _Functions(TorchFunctionMode):
    """Notes what a dispatch mode does not see: tensors that are made of lists, and lists as an index."""

    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.syncs.device.type == "cpu":
            return result
        if func in FROM_LISTS and not isinstance(args[-1], Tensor) and result.device == self.syncs.device:
            self.syncs.note(func.__name__)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device == self.syncs.device:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(each, list) for each in index):
                self.syncs.note(func.__name__)
        return result


class _Measured(Exception):
    """The step has been measured."""


def syncs_of_step(stages: Sequence[CfgNode]) -> list[str]:
    """The operations of one step of the trainer for which the host waits, between two lines of the log.

    It is the second step of the last stage, with everything that the trainer does up to the next batch. The arithmetic
    is that of a GPU without loss scaling.

    Args:
        stages: configs of the run and of the stages before it.
    """
    cfg = resolve(stages[-1])
    method, _ = ready_to_train(cfg, [outline(resolve(stage)) for stage in stages[-2:]])
    accelerator = make_accelerator(Devices("fp32", cfg.seed, cfg.deterministic))
    PartialState().device = accelerator.state.device = META
    syncs = HostSyncs()

    def batches() -> Iterator[Batch]:
        batch = blank_batch(method, META, IMAGES, cfg.resolution)
        yield dict(batch)
        syncs.found.clear()
        yield dict(batch)
        raise _Measured

    try:
        with syncs:
            fit(cfg, method, accelerator, batches(), IMAGES, IMAGES)
    except _Measured:
        return syncs.found
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    raise AssertionError("the trainer asks for a batch in each step")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the operations, one on a line, and their number.

    Returns:
        The exit code: 2 for wrong input.
    """
    return exit_code_of(_command, argv)


def _command(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m tailtune.benchmarks.steps.host_syncs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", metavar="DATA", help="data config")
    parser.add_argument("model", metavar="MODEL", help="model config")
    parser.add_argument("pairs", nargs="*", metavar="KEY VALUE", help="options, such as lora True")
    args = parser.parse_args(argv)
    found = syncs_of_step(load_configs(args.data, args.model, args.pairs, declared()))
    print("\n".join([*found, f"{len(found)} syncs in a step"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
