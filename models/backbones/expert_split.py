"""Which blocks of a backbone each expert has for itself (`expert_split`)."""

from collections.abc import Iterable

from torch import nn

from tailtune.configs.errors import UserError
from tailtune.models.backbones.backbone_types import Split
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.vit_encoder import ViTEncoder


def divide(host: Encoder, split: Split, name: str) -> None:
    """Let experts have tuners of their own in the last `expert_split` blocks of a frozen ViT; none: in no block.

    Raises:
        UserError: the backbone cannot be divided so.
    """
    ours = "our ResNets (ResNet-32, ResNeXt-50 …) can"
    if split.reduced:
        raise UserError(f"reduce_dimension: the stages of {name} are as wide as they came; {ours} be narrower")
    if split.experts == 1 or not split.own:
        return
    if not isinstance(host, ViTEncoder):
        raise UserError(
            f"expert_split {split.own}: {name} runs as a whole, so its experts share all but the heads; leave it out, "
            f"or choose another backbone: {ours}, and ViTs"
        )
    if split.own > host.depth:
        raise UserError(f"expert_split {split.own}: {name} has {host.depth} blocks; choose 0 to {host.depth}")
    host.divide(split.experts, split.own)


def refuse_expert_blocks(host: Encoder, name: str, modules: Iterable[nn.Module]) -> None:
    """Raise a `UserError` where a tuner would train the network's layers in blocks that experts have for themselves."""
    own = {id(each) for part in host.divided for each in part.modules()}
    if any(id(each) in own for module in modules for each in module.modules()):
        count = len(host.divided)
        raise UserError(
            f"{name} trains the network's own layers, which experts share, also in the last {count} blocks that each "
            f"has for itself (expert_split {count}): set expert_split 0, or partial [0,{host.depth - count})"
        )
