"""TUNERS: what of a frozen ViT trains. A tuner's flag on the command line is its name in the table.

A tuner either inserts modules at a block's sites or selects parameters of the block. Tuners combine; at a shared
site they act in the order of the table. `partial` holds for every one of them (LIFT ignores it for biases, norms and
shallow prompts).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from timm.models.vision_transformer import Block
from torch import nn

from configs.errors import UserError
from configs.seeding import seeded
from models.tuner_modules import Adapter, AdaptFormer, Lora, Prompts
from models.vit import ViT


@dataclass(frozen=True)
class Sizes:
    bottleneck: int
    prompts: int


@dataclass(frozen=True)
class Tuner:
    """Exactly one of the two is given.

    insert: (host, sizes) → site → module, for one block.
    select: block → the parameters that train.
    """

    insert: Callable[[ViT, Sizes], dict[str, nn.Module]] | None = None
    select: Callable[[Block], Iterable[nn.Parameter]] | None = None
    first_only: bool = False
    """Inserted at the first block of the range only."""


def _adaptformer(host: ViT, sizes: Sizes) -> dict[str, nn.Module]:
    return {"mlp": AdaptFormer(host.width, sizes.bottleneck)}


def _adapter(host: ViT, sizes: Sizes) -> dict[str, nn.Module]:
    return {"mlp": Adapter(host.width, sizes.bottleneck)}


def _lora(host: ViT, sizes: Sizes) -> dict[str, nn.Module]:
    return {site: Lora(host.width, host.width, sizes.bottleneck) for site in ("q", "v")}


def _prompts(host: ViT, sizes: Sizes) -> dict[str, nn.Module]:
    return {"tokens": Prompts(sizes.prompts, host.width, host.patch_size)}


def _biases(block: Block) -> Iterator[nn.Parameter]:
    return (parameter for name, parameter in block.named_parameters() if name.endswith("bias"))


def _norms(block: Block) -> Iterator[nn.Parameter]:
    yield from block.norm1.parameters()
    yield from block.norm2.parameters()


TUNERS: dict[str, Tuner] = {
    "full_tuning": Tuner(select=Block.parameters),
    "bias_tuning": Tuner(select=_biases),
    "ln_tuning": Tuner(select=_norms),
    "vpt_shallow": Tuner(insert=_prompts, first_only=True),
    "vpt_deep": Tuner(insert=_prompts),
    "lora": Tuner(insert=_lora),
    "adapter": Tuner(insert=_adapter),
    "adaptformer": Tuner(insert=_adaptformer),
}


def bottleneck_dim(num_classes: int, depth: int) -> int:
    """LIFT's rule: r = 2^max(0, ⌊log2(C / 2L)⌋), so that tuners stay smaller than the head."""
    return 2 ** max(0, int(math.log2(num_classes / (2 * depth))))


def add_tuners(
    host: ViT, names: Sequence[str], sizes: Sizes, partial: int | Sequence[int] | None = None, seed: int = 0
) -> None:
    """Freeze the host, then make the named tuners act on the blocks of `partial`.

    Raises:
        UserError: two kinds of prompts, or a range beyond the network.
    """
    if {"vpt_shallow", "vpt_deep"} <= set(names):
        raise UserError("vpt_shallow and vpt_deep both own the prompt tokens; choose one of them")
    blocks = _range(partial, host.depth)
    host.requires_grad_(False)
    for name in (name for name in TUNERS if name in names):
        tuner = TUNERS[name]
        for index in blocks[:1] if tuner.first_only else blocks:
            if tuner.insert is not None:
                with seeded(seed, "tuner", name, index):
                    host.insert(name, index, tuner.insert(host, sizes))
            if tuner.select is not None:
                for parameter in tuner.select(host.net.blocks[index]):
                    parameter.requires_grad_(True)


def _range(partial: int | Sequence[int] | None, depth: int) -> range:
    """None: all; k: the last k; [start, end): those."""
    start, end = (0, depth) if partial is None else (depth - partial, depth) if isinstance(partial, int) else partial
    if start < 0 or end > depth:
        raise UserError(f"partial {partial} asks for more blocks than the {depth} of this backbone")
    return range(start, end)
