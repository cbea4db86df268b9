"""Processes and devices of a run, which Accelerate manages."""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    set_seed,
)
from torch import Tensor, nn

from tailtune.configs import CfgNode
from tailtune.configs.errors import UserError
from tailtune.configs.launch_environment import is_on, world_size
from tailtune.models.backbones.encoder import trained_batch_norms
from tailtune.trainers.precision import PRECISIONS, precision_used
from tailtune.trainers.processes.kept_memory import keep_freed_memory
from tailtune.trainers.sharding import sharding_plugin

Decision = TypeVar("Decision")
COPIED_ROWS = 1 << 14
"""Number of rows of a tensor that a process sends to the others at once."""
PLACES = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
"""Environment variables by which a launcher tells each process its rank and the number of processes."""
PATIENCE = timedelta(hours=3)
"""How long processes wait for the first process, which alone computes metrics and adaptations from the logits."""
LATE = 30.0
"""Seconds after which a process logs that it waits for other processes."""

log = logging.getLogger("tailtune")


def on_main(accelerator: Accelerator, decide: Callable[[], Decision]) -> Decision:
    """Call `decide` on the first process and return its result on all processes.

    A `UserError` is raised on all processes too, so that no process waits for ever.

    Args:
        accelerator: the processes. All must call this together.
        decide: computes the result, which must be picklable.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = decide()
        except UserError as error:
            outcome[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def gather_to_main(accelerator: Accelerator, tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """The rows of some tensors of all processes, on the CPU of the first process, which alone receives them.

    Args:
        accelerator: the processes. All must call this together.
        tensors: tensors [B, …] of this process; their shapes are the same on all processes.

    Returns:
        The same tensors with the rows of all P processes, [P·B, …], one process after the other; None on every
        process but the first.
    """
    if accelerator.num_processes == 1:
        return [tensor.cpu() for tensor in tensors]
    found = []
    for tensor in (each.contiguous() for each in tensors):
        parts = [torch.empty_like(tensor) for _ in range(accelerator.num_processes * accelerator.is_main_process)]
        torch.distributed.gather(tensor, parts or None)
        found += [torch.cat(parts).cpu()] if parts else []
    return found or None


def copied_from_main(accelerator: Accelerator, tensors: Sequence[Tensor] | None) -> list[Tensor]:
    """Tensors of the first process, on the CPU of every process.

    Args:
        accelerator: the processes. All must call this together.
        tensors: tensors [N, …] on the CPU; only those of the first process are read.
    """
    kinds = on_main(accelerator, lambda: [(each.shape, each.dtype) for each in tensors or ()])
    if tensors is None or not accelerator.is_main_process:
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in kinds]
    for part in (part for each in tensors for part in each.split(COPIED_ROWS)) if accelerator.num_processes > 1 else ():
        sent = part.to(accelerator.device)  # a GPU holds a part at a time
        torch.distributed.broadcast(sent, 0)
        part.copy_(sent)
    return list(tensors)


def gather_objects_to_main(accelerator: Accelerator, own: Any) -> list[Any]:
    """A picklable object of each process, on the first process; an empty list on the others. All must call this."""
    if accelerator.num_processes == 1:
        return [own]
    found = [None] * accelerator.num_processes * accelerator.is_main_process
    torch.distributed.gather_object(own, found or None)
    return found


def uses_cuda() -> bool:
    """Whether this run computes on a GPU. `accelerate launch --cpu` turns this off."""
    return torch.cuda.is_available() and not is_on("ACCELERATE_USE_CPU")


def launched_alone() -> bool:
    """Whether `accelerate launch` started one process although several were requested, as it does without GPUs."""
    return "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ and "WORLD_SIZE" not in os.environ


@dataclass(frozen=True)
class Devices:
    """The settings of devices and arithmetic of a run, read from the config."""

    prec: str
    seed: int
    deterministic: bool
    gpu: int | None = None
    """Number of the CUDA device of a single process; None: the first device."""

    @classmethod
    def of(cls, cfg: CfgNode) -> "Devices":
        """Read the settings from a config."""
        return cls(cfg.prec, cfg.seed, cfg.deterministic, cfg.gpu)


def make_accelerator(asked: Devices) -> Accelerator:
    """Set up devices, processes, loss scaling and random seeds. Autocast is off, because encoders set their own dtype.

    Raises:
        UserError: the CUDA device does not exist.
    """
    cuda = uses_cuda()
    if asked.gpu is not None and cuda and world_size() == 1:
        if asked.gpu >= torch.cuda.device_count():
            raise UserError(f"gpu {asked.gpu}: there are {torch.cuda.device_count()}, counted from 0")
        os.environ["ACCELERATE_TORCH_DEVICE"] = f"cuda:{asked.gpu}"
        torch.cuda.set_device(asked.gpu)  # Accelerate leaves the current device alone then
    if not cuda:
        keep_freed_memory()
    AcceleratorState._reset_state()  # the stages of a chain may differ in precision, which it would refuse
    plugin = sharding_plugin()
    with _said_when_late():
        accelerator = _accelerator(asked.prec, cuda, plugin)
    if plugin is not None:
        accelerator.state.fsdp_plugin = plugin  # Accelerate does so on GPUs only
    choose_kernels(asked.deterministic, cuda)
    # Only dropout draws from the global generators. Each process has a seed of its own, because its images differ.
    set_seed(asked.seed % 2**31, device_specific=True)
    return accelerator


def choose_kernels(deterministic: bool, cuda: bool) -> None:
    """Let torch use only kernels whose results are reproducible, or the fastest ones.

    Besides convolutions, the backward pass of fused attention and sums by index are not reproducible on a GPU unless
    torch is told so. Where torch has no reproducible kernel, it warns.

    Args:
        deterministic: the option `deterministic`.
        cuda: whether there is a GPU. The kernels of a CPU are reproducible.
    """
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    if cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it before its first product
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # takes time


def _accelerator(prec: str, cuda: bool, plugin: FullyShardedDataParallelPlugin | None) -> Accelerator:
    return Accelerator(
        fsdp_plugin=plugin,
        cpu=not cuda,  # without it Accelerate overlooks the other processes of a CPU launch
        gradient_accumulation_steps=1,
        mixed_precision="fp16" if PRECISIONS[precision_used(prec, cuda)].scaled else "no",
        kwargs_handlers=[
            AutocastKwargs(enabled=False),
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )


@contextmanager
def _said_when_late() -> Iterator[None]:
    """Log a warning if the other processes of the launch do not connect within `LATE` seconds."""
    count, where = world_size(), ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    text = f"warning: waiting for the other processes of {count} (WORLD_SIZE) at {where}; unset {', '.join(PLACES)} "
    late = threading.Timer(LATE, log.warning, [f"{text}if there are none"])
    late.daemon = True
    if count > 1:
        late.start()
    try:
        yield
    finally:
        late.cancel()


@torch.no_grad()
def share_statistics(accelerator: Accelerator, module: nn.Module) -> None:
    """Replace the running statistics of trained batch norms by their mean over the processes, in place.

    Each process gathers the statistics on its own images, and DDP broadcasts no buffers here. Training does not read
    the statistics, so they may differ until a state is saved or evaluated. A run that resumes from a saved state has
    the same statistics as an uninterrupted run.
    """
    if accelerator.num_processes == 1:
        return
    for norm in trained_batch_norms(module):
        for buffer in norm.buffers():
            if buffer.is_floating_point():
                buffer.copy_(accelerator.reduce(buffer, "mean"))
