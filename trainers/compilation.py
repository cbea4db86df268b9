"""`compile`: torch.compile makes the code of a ViT's blocks, forward and backward, while a run trains.

Ansel et al., ASPLOS 2024. Blocks of the same structure share one compiled code. Everything else runs as it is written:
embedding, last norm, head and loss, text encoders, evaluation, and batches of fewer images than the largest.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.transformer_encoder import TransformerEncoder
from tailtune.trainers.methods.base import Method
from tailtune.trainers.sharding import is_sharded

BACKEND = "inductor"
OPTIONS: dict[str, Any] = {"fallback_random": True}
"""Of the backend: dropout draws the numbers that it draws without `compile`."""
STRUCTURES = 64
"""How many different blocks are compiled; where blocks of one ViT have different tuners, it may be some dozens."""

log = logging.getLogger("tailtune")


def check_compile(encoder: Encoder, backbone: str) -> None:
    """Check that `compile` works for an encoder, which may lie on the meta device, and for this launch.

    Args:
        encoder: the image encoder.
        backbone: its name.

    Raises:
        UserError: the encoder does not run block by block, or the launch asks for FSDP.
    """
    if not isinstance(encoder, TransformerEncoder):
        raise UserError(f"compile works on ViTs only, and {backbone} does not run as one; leave it out")
    if is_sharded():
        raise UserError("compile does not go with FSDP: launch with --multi_gpu, or leave it out")


@contextmanager
def compiled_blocks(method: Method, wanted: bool, keeps_graph: bool = False) -> Iterator[None]:
    """Within this block, the encoder of a method trains with compiled blocks.

    No module changes, so names of tensors stay as they are.

    Args:
        method: a method that `check_compile` accepts.
        wanted: False: nothing happens.
        keeps_graph: whether a graph may take two backward passes.
    """
    encoder: Any = method.model.encoder
    if wanted:
        log.info("compile: torch compiles the blocks in the first step, which takes longer")
        encoder.compute_block = CompiledBlock(encoder.compute_block, keeps_graph)
    try:
        yield
    finally:
        if wanted:
            del encoder.compute_block  # the attribute of the instance, which hides the method


class CompiledBlock:
    """`TransformerEncoder.compute_block`, compiled for the training batches of the largest size so far.

    Another size would need another compilation. Smaller batches, such as the last one of an epoch, run as written.

    Args:
        compute: the function; its first two arguments are a block and its input [B, N, D].
        keeps_graph: see `compiled_blocks`.
    """

    def __init__(self, compute: Callable[..., Tensor], keeps_graph: bool) -> None:
        self.plain, self.compiled, self.largest = compute, compiled(compute, keeps_graph), 0

    def __call__(self, block: Any, x: Tensor, *rest: Any) -> Tensor:
        if not torch.is_grad_enabled() or len(x) < self.largest:
            return self.plain(block, x, *rest)
        self.largest = len(x)
        return self.compiled(block, x, *rest)


def compiled(compute: Callable[..., Tensor], keeps_graph: bool) -> Callable[..., Tensor]:
    """A function as torch.compile makes it, when it is first called with arguments of a structure.

    Unless a graph is kept, its backward pass may write over what was saved for it (donated buffers). The function that
    is returned raises a `UserError` where torch cannot compile it, such as without a C++ compiler.
    """
    from torch._dynamo import config, exc  # its import takes seconds
    from torch._functorch import config as autograd

    donates = autograd.donated_buffer and not keeps_graph
    code = torch.compile(compute, dynamic=False, fullgraph=True, backend=BACKEND, options=OPTIONS)

    def run(*inputs: Any) -> Tensor:
        try:
            # A block is small, so DDP need not cut it.
            with config.patch(recompile_limit=STRUCTURES, optimize_ddp=False), autograd.patch(donated_buffer=donates):
                return code(*inputs)
        except exc.TorchDynamoException as error:
            why = str(error).strip().partition("\n")[0]
            raise UserError(
                f"compile: torch cannot compile the blocks of this model ({why}); install a C++ compiler if there is "
                "none, or leave compile out"
            ) from error

    return run
