"""Training whose parameters, gradients and optimizer states are sharded over the processes (FSDP2).

`accelerate launch --use_fsdp --fsdp_version 2` asks for it. Each block of a transformer is a unit of FSDP, and the rest
of the method is one more. The processes gather the parameters of a block before its forward pass and its backward pass,
and free them afterwards. Each process keeps a share of all parameters, gradients and optimizer states.

Everything outside the training loop keeps to a method that is not sharded: it gets the trained values at the end.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from tailtune.configs.errors import UserError
from tailtune.configs.launch_environment import is_on, world_size
from tailtune.models.backbones.transformer_encoder import TransformerEncoder
from tailtune.models.heads.expert_heads import heads_of
from tailtune.trainers.methods.base import Method


def is_sharded() -> bool:
    """Whether the launch asks for FSDP, on more than one process."""
    return is_on("ACCELERATE_USE_FSDP") and world_size() > 1


def sharding_plugin() -> FullyShardedDataParallelPlugin | None:
    """The settings of FSDP, without the units of parameters; None if the launch does not ask for it.

    Raises:
        UserError: the launch asks for version 1.
    """
    if not is_sharded():
        return None
    if os.environ.get("FSDP_VERSION", "2") != "2":
        raise UserError("FSDP of version 1 is not supported: set fsdp_version to 2 in the config of accelerate launch")
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[],
        cpu_ram_efficient_loading=False,
        state_dict_type="FULL_STATE_DICT",
    )


def make_units(method: Method, plugin: FullyShardedDataParallelPlugin) -> None:
    """Make each block of a transformer a unit of FSDP. Other networks stay in one unit with the rest of the method."""
    names = set()
    for encoder in method.modules():
        if isinstance(encoder, TransformerEncoder):
            encoder.call_blocks()
            names |= {type(block).__name__ for block in encoder.blocks}
    plugin.transformer_cls_names_to_wrap = sorted(names)


def prepared(
    accelerator: Accelerator, method: Method, optimizer: torch.optim.Optimizer, micro_batch_size: int
) -> tuple[Any, Any]:
    """As `accelerator.prepare`, sharded if the launch asks for it.

    Raises:
        UserError: the run does not go with FSDP: its micro-batches have one image, its text features train, a tuner
            reads weights between the blocks, or its precision scales the loss, and a share of the gradients cannot
            tell whether all are finite.
    """
    if not is_sharded():
        return accelerator.prepare(method, optimizer)
    if micro_batch_size < 2:
        raise UserError("micro_batch_size 1 does not go with FSDP: set it to 2 or more")
    if method.model.text is not None:
        raise UserError(
            f"classifier {type(heads_of(method.model.head)[0]).__name__} does not go with FSDP, which frees parameters "
            "between the micro-batches that share the text features: launch without it"
        )
    if method.model.peft is not None and method.model.peft.reads_weights:
        raise UserError(f"peft {method.model.peft.name} reads weights that FSDP has freed: launch without it")
    if accelerator.scaler is not None:
        raise UserError("prec amp scales the loss, which FSDP does not support here: use prec bf16 or fp32")
    state = accelerator.state
    make_units(method, state.fsdp_plugin)
    before = state.distributed_type
    state.distributed_type = DistributedType.FSDP  # on CPUs it would choose DDP
    try:
        return accelerator.prepare(method, optimizer)
    finally:
        state.distributed_type = before  # all other collectives are those of plain processes


@contextmanager
def without_reduction(accelerator: Accelerator, wrapped: Any) -> Iterator[None]:
    """In the block, a backward pass adds to the gradients of this process alone, unless they are sharded.

    Gradients of several micro-batches would be whole on every process, so FSDP shares those of each micro-batch.
    """
    with nullcontext() if is_sharded() else accelerator.no_sync(wrapped):
        yield


def copy_to_shard(method: Method) -> Method:
    """A copy of a method that may be sharded. The method itself waits on the CPU, where it needs no GPU memory."""
    copied = copy.deepcopy(method.to("cpu"))
    for parameter in copied.parameters():
        parameter.data = parameter.data.contiguous()  # those of a convnet are channels_last, which FSDP does not take
    return copied


def whole(tensors: Mapping[str, Tensor], wanted: bool = True) -> dict[str, Tensor]:
    """Tensors, of which sharded ones are gathered to the CPU one after another. All processes must call this together.

    Args:
        tensors: name → tensor.
        wanted: whether this process needs them; False: sharded ones are left out.
    """
    found = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            found[name] = tensor
        else:
            gathered = tensor.full_tensor()
            if wanted:
                found[name] = gathered.cpu()
    return found


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor. It shares the memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_states(optimizer: torch.optim.Optimizer) -> None:
    """Shard the states of an optimizer that have the shapes of their parameters, as their parameters are."""
    for parameter, state in optimizer.state.items():
        if isinstance(parameter, DTensor):
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and not isinstance(value, DTensor):
                    state[name] = distribute_tensor(  # each process has the whole value, so none is sent
                        value, parameter.device_mesh, parameter.placements, src_data_rank=None
                    )
