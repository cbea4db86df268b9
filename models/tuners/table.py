"""TUNERS: what of a frozen backbone trains. A tuner's flag on the command line is its name in the table.

A tuner inserts modules at the sites of a ViT's blocks, selects weights of the backbone, or acts on the feature of a
backbone without blocks. Tuners combine; at a shared site they act in the order of the table. `partial` holds for
every one of them (LIFT ignores it for biases, norms and shallow prompts).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from tailtune.configs.errors import UserError
from tailtune.configs.seeding import derive_seed, seeded
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.expert_split import refuse_divided
from tailtune.models.backbones.generic import GenericEncoder
from tailtune.models.backbones.vit import ViT
from tailtune.models.tuners.modules import Adapter, AdaptFormer, Lora, Mask, Prompts, Ssf


@dataclass(frozen=True)
class Sizes:
    """The numbers that tuners are built from."""

    bottleneck: int
    prompts: int
    mask_ratio: float = 0.001
    mask_seed: int = 0
    adaptformer_scale: float | None = None
    """None: learnable."""

    @cached_property
    def draw(self) -> torch.Generator:
        """Mask's one generator, which goes on from layer to layer and from block to block, as LIFT's."""
        return torch.Generator().manual_seed(self.mask_seed)


@dataclass(frozen=True)
class Tuner:
    """What it does to a host; exactly one of insert and select is given.

    insert: (ViT, index of a block, sizes) → site → module.
    select: module → the parameters of it that train; of the blocks, or of any other backbone as a whole.
    """

    insert: Callable[[ViT, int, Sizes], dict[str, nn.Module]] | None = None
    select: Callable[[nn.Module], Iterable[nn.Parameter]] | None = None
    on_feature: Callable[[int], nn.Module] | None = None
    """Width → what it puts on the feature of a backbone that runs as a whole, in place of `insert`."""
    first_only: bool = False
    """Inserted at the first block of the range only."""
    on_weights: bool = False
    """Inserted at the weights of layers instead of their outputs."""
    on_batch: bool = False
    """Selected batch norms train on the statistics of the batch and update their running ones."""


def _adaptformer(host: ViT, index: int, sizes: Sizes) -> dict[str, nn.Module]:
    return {"mlp": AdaptFormer(host.width, sizes.bottleneck, sizes.adaptformer_scale)}


def _adapter(host: ViT, index: int, sizes: Sizes) -> dict[str, nn.Module]:
    return {"mlp": Adapter(host.width, sizes.bottleneck)}


def _lora(host: ViT, index: int, sizes: Sizes) -> dict[str, nn.Module]:
    return {site: Lora(host.width, host.width, sizes.bottleneck) for site in ("q", "v")}


def _lora_mlp(host: ViT, index: int, sizes: Sizes) -> dict[str, nn.Module]:
    inner, outer = host.hidden_width, host.width
    return {"fc1": Lora(outer, inner, sizes.bottleneck), "fc2": Lora(inner, outer, sizes.bottleneck)}


def _prompts(host: ViT, index: int, sizes: Sizes) -> dict[str, nn.Module]:
    return {"tokens": Prompts(sizes.prompts, host.width, host.patch_size)}


def _ssf(*sites: str) -> Callable[[ViT, int, Sizes], dict[str, nn.Module]]:
    """Scale and shift at the named sites."""
    return lambda host, index, sizes: {site: Ssf(host.hidden_width if site == "fc1" else host.width) for site in sites}


def _mask(host: ViT, index: int, sizes: Sizes) -> dict[str, nn.Module]:
    return {name: Mask(layer, sizes.mask_ratio, sizes.draw) for name, layer in host.layers(index).items()}


def _biases(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for name, parameter in module.named_parameters() if name.endswith("bias"))


def _of(kind: type[nn.Module]) -> Callable[[nn.Module], Iterator[nn.Parameter]]:
    """The parameters of all modules of a kind."""
    return lambda module: (each for part in module.modules() if isinstance(part, kind) for each in part.parameters())


TUNERS: dict[str, Tuner] = {
    "full_tuning": Tuner(select=nn.Module.parameters),
    "bias_tuning": Tuner(select=_biases),
    "ln_tuning": Tuner(select=_of(nn.LayerNorm)),
    "bn_tuning": Tuner(select=_of(nn.BatchNorm2d), on_batch=True),
    "mask": Tuner(insert=_mask, on_weights=True),
    "vpt_shallow": Tuner(insert=_prompts, first_only=True),
    "vpt_deep": Tuner(insert=_prompts),
    "lora": Tuner(insert=_lora),
    "lora_mlp": Tuner(insert=_lora_mlp),
    "ssf_attn": Tuner(insert=_ssf("q", "k", "v", "proj"), on_feature=Ssf),
    "ssf_mlp": Tuner(insert=_ssf("fc1", "fc2")),
    "ssf_ln": Tuner(insert=_ssf("norm1", "norm2")),
    "adapter": Tuner(insert=_adapter),
    "adaptformer": Tuner(insert=_adaptformer),
}


def bottleneck_dim(num_classes: int, depth: int) -> int:
    """LIFT's rule: r = 2^max(0, ⌊log2(C / 2L)⌋), so that tuners stay smaller than the head."""
    return 2 ** max(0, int(math.log2(num_classes / (2 * max(1, depth)))))


def mask_ratio(num_classes: int, depth: int, width: int) -> float:
    """LIFT's rule: ρ = C / 12LD in whole thousandths, at least one, so that what trains is as large as the head."""
    return max(1, 1000 * num_classes // (12 * max(1, depth) * width)) / 1000


def add_tuners(
    host: Encoder, names: Sequence[str], sizes: Sizes, partial: int | Sequence[int] | None = None, seed: int = 0
) -> None:
    """Freeze the host, then make the named tuners act on the blocks of `partial`.

    Raises:
        UserError: two kinds of prompts, a tuner that finds nothing to act on, a range beyond the network, or a
            share of weights beyond all of them; experts whose own blocks would not differ.
    """
    if {"vpt_shallow", "vpt_deep"} <= set(names):
        raise UserError("vpt_shallow and vpt_deep both own the prompt tokens; choose one of them")
    if "mask" in names and not 0 < sizes.mask_ratio <= 1:
        raise UserError(f"mask_ratio {sizes.mask_ratio} is no share of the weights; choose one above 0 and up to 1")
    blocks, sizes = host.chosen(partial), replace(sizes)  # a copy, whose draw begins anew
    host.requires_grad_(False)
    for name in (name for name in TUNERS if name in names):
        tuner = TUNERS[name]
        if tuner.insert is not None:
            _insert(host, name, blocks[:1] if tuner.first_only else blocks, sizes, seed)
        if tuner.select is not None:
            _select(host, name, partial)
    if isinstance(host, ViT) and host.own and not any(any(sites.values()) for sites in host.sites[0][-host.own :]):
        raise UserError(
            f"expert_split {host.own}: no tuner acts in the last {host.own} blocks, which experts would only repeat; "
            "turn one on (adaptformer, lora …) or widen partial, or set expert_split 0"
        )


def _insert(host: Encoder, name: str, blocks: range, sizes: Sizes, seed: int) -> None:
    tuner = TUNERS[name]
    assert tuner.insert is not None
    if isinstance(host, GenericEncoder) and tuner.on_feature is not None:
        if blocks or not host.depth:  # behind the last part, whichever the others are
            with seeded(seed, "tuner", name):
                host.insert(name, tuner.on_feature(host.feature_dim))
        return
    if not isinstance(host, ViT):
        others = ", ".join(each for each, entry in TUNERS.items() if entry.select or entry.on_feature)
        raise UserError(f"{name} acts inside the blocks of a ViT, and this backbone runs as a whole; it takes {others}")
    later = [replace(sizes, mask_seed=derive_seed(sizes.mask_seed, "expert", each)) for each in range(1, host.experts)]
    for index in blocks:
        own = index >= host.depth - host.own
        with seeded(seed, "tuner", name, index):
            host.insert(name, index, tuner.insert(host, index, sizes), tuner.on_weights, 0 if own else None)
        for expert, drawn in enumerate(later if own else [], start=1):
            with seeded(seed, "tuner", name, index, expert):  # the first one starts as if it were alone
                host.insert(name, index, tuner.insert(host, index, drawn), tuner.on_weights, expert)


def _select(host: Encoder, name: str, partial: int | Sequence[int] | None) -> None:
    select = TUNERS[name].select
    assert select is not None
    modules = host.selectable(partial)
    refuse_divided(host, name, modules)
    found = [each for module in modules for each in select(module)]
    if modules and not found:
        raise UserError(f"{name} finds nothing to train in this backbone")
    for parameter in found:
        parameter.requires_grad_(True)
    if TUNERS[name].on_batch:
        host.batch_norms = [each for module in modules for each in module.modules() if isinstance(each, nn.BatchNorm2d)]
