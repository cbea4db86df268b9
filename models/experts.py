"""Experts: several classifiers, on one feature or each on its own, whose logits are averaged."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.errors import UserError
from configs.seeding import generator
from models.backbone import Split
from models.host import Host
from models.vit import ViT

APART = 0.01
"""Of a row's length: how far heads that are given the same start begin from each other."""


class ExpertHeads(nn.ModuleList):
    """One head for each expert.

    Args:
        heads: E heads, features [B, D] → logits [B, C].
    """

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__(heads)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, D] that all experts share, or [B, E, D] → logits [B, E, C]."""
        own = [features] * len(self) if features.ndim == 2 else features.unbind(1)
        return torch.stack([head(each) for head, each in zip(self, own, strict=True)], dim=1)


def heads_of(head: nn.Module) -> list[nn.Module]:
    """The head of every expert, one for a model without experts."""
    return list(head) if isinstance(head, ExpertHeads) else [head]


def apart(weight: Tensor, expert: int, seed: int) -> Tensor:
    """The rows [C, D] that the head of an expert begins with, where all are given the same; the first gets these.

    Experts that are alike in everything have the same gradients and stay one, whatever rewards a difference.
    """
    if expert == 0:
        return weight
    noise = torch.randn(weight.shape, generator=generator(seed, "expert", expert)).to(weight)
    return weight + APART * weight.norm(dim=-1, keepdim=True) * F.normalize(noise, dim=-1)


def divide(host: Host, split: Split, name: str) -> None:
    """Let experts have tuners of their own in the last `expert_split` blocks of a frozen ViT; none: in no block.

    Raises:
        UserError: the backbone cannot be divided so.
    """
    ours = "our ResNets (ResNet-32, ResNeXt-50 …) can"
    if split.reduced:
        raise UserError(f"reduce_dimension: the stages of {name} are as wide as they came; {ours} be narrower")
    if split.experts == 1 or not split.own:
        return
    if not isinstance(host, ViT):
        raise UserError(
            f"expert_split {split.own}: {name} runs as a whole, so its experts share all but the heads; leave it out, "
            f"or choose another backbone: {ours}, and ViTs"
        )
    if split.own > host.depth:
        raise UserError(f"expert_split {split.own}: {name} has {host.depth} blocks; choose 0 to {host.depth}")
    host.divide(split.experts, split.own)


def refuse_divided(host: Host, name: str, modules: Iterable[nn.Module]) -> None:
    """Raise a `UserError` where a tuner would train the network's layers in blocks that experts have for themselves."""
    own = {id(each) for part in host.divided for each in part.modules()}
    if any(id(each) in own for module in modules for each in module.modules()):
        count = len(host.divided)
        raise UserError(
            f"{name} trains the network's own layers, which experts share, also in the last {count} blocks that each "
            f"has for itself (expert_split {count}): set expert_split 0, or partial [0,{host.depth - count})"
        )
