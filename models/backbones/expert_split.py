"""Which blocks of a pre-trained backbone each expert has for itself (option `expert_split`)."""

from collections.abc import Iterable

from torch import nn

from tailtune.configs.errors import UserError
from tailtune.models.backbones.backbone_types import ExpertSplit
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.vit_encoder import ViTEncoder


def split_experts(encoder: Encoder, split: ExpertSplit, name: str) -> None:
    """Let each expert have tuners of its own in the last blocks of a frozen ViT; None and 0: in no block.

    Args:
        encoder: the encoder, before any tuner is inserted.
        split: the number of experts and of their own blocks.
        name: what the backbone is called in messages.

    Raises:
        UserError: the backbone cannot be split like this.
    """
    resnets = "our ResNets (ResNet-32, ResNeXt-50 …)"
    if split.reduced:
        raise UserError(f"reduce_dimension: the stages of {name} have a fixed width; set it to False, or use {resnets}")
    if split.experts == 1 or not split.own_blocks:
        return
    if not isinstance(encoder, ViTEncoder):
        raise UserError(
            f"expert_split {split.own_blocks}: {name} runs as a whole, so its experts share everything but the heads; "
            f"leave expert_split out, or choose a ViT or one of {resnets}"
        )
    if split.own_blocks > encoder.depth:
        raise UserError(
            f"expert_split {split.own_blocks}: {name} has {encoder.depth} blocks; choose 0 to {encoder.depth}"
        )
    encoder.split_experts(split.experts, split.own_blocks)


def refuse_expert_blocks(encoder: Encoder, name: str, modules: Iterable[nn.Module]) -> None:
    """Refuse a tuner that trains the network's own layers in blocks that experts have for themselves.

    Args:
        encoder: the encoder.
        name: the tuner, in messages.
        modules: the modules whose own weights the tuner would train.

    Raises:
        UserError: one of them is within such a block.
    """
    within = {id(module) for block in encoder.expert_blocks for module in block.modules()}
    if any(id(submodule) in within for module in modules for submodule in module.modules()):
        count = len(encoder.expert_blocks)
        raise UserError(
            f"{name} trains weights that all experts share, also in the last {count} blocks that each expert has for "
            f"itself (expert_split {count}): set expert_split 0, or partial [0,{encoder.depth - count})"
        )
