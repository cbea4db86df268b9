"""TUNERS: which parameters train while the backbone is frozen. A tuner's name is its flag on the command line.

A tuner inserts modules at the sites of a ViT's blocks (`ViTEncoder` lists the sites), selects weights of the backbone,
or acts on the feature of a backbone that runs as a whole. Tuners can be combined; at a shared site they act in the
order of the table. `partial` holds for all of them (LIFT ignores it for biases, norms and shallow prompts).
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
from tailtune.models.backbones.expert_split import refuse_expert_blocks
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.models.backbones.whole_network_encoder import WholeNetworkEncoder
from tailtune.models.tuners.tuner_modules import Adapter, AdaptFormer, Lora, Mask, Prompts, Ssf


@dataclass(frozen=True)
class Sizes:
    """The numbers that tuners are built from, such as the LoRA rank (`bottleneck`)."""

    bottleneck: int
    prompts: int
    mask_ratio: float = 0.001
    mask_seed: int = 0
    adaptformer_scale: float | None = None
    """None: learnable."""

    @cached_property
    def draw(self) -> torch.Generator:
        """The generator of all masks: as in LIFT, one that goes on from layer to layer and from block to block."""
        return torch.Generator().manual_seed(self.mask_seed)


@dataclass(frozen=True)
class Tuner:
    """What a tuner does to an encoder: it inserts modules or selects parameters; exactly one of the two is given.

    insert: (encoder, index of a block, sizes) → site → module.
    select: module → those of its parameters that train. It is called with the blocks of `partial`, or with the whole
        network.
    """

    insert: Callable[[ViTEncoder, int, Sizes], dict[str, nn.Module]] | None = None
    select: Callable[[nn.Module], Iterable[nn.Parameter]] | None = None
    on_feature: Callable[[int], nn.Module] | None = None
    """Width of the feature → the module that acts on the feature of a backbone that runs as a whole."""
    first_only: bool = False
    """Whether it is inserted at the first block of `partial` only."""
    on_weights: bool = False
    """Whether it is inserted at the weights of layers instead of their outputs."""
    on_batch: bool = False
    """Whether the selected batch norms use the statistics of the batch and update their running ones."""


def _adaptformer(encoder: ViTEncoder, index: int, sizes: Sizes) -> dict[str, nn.Module]:
    return {"mlp": AdaptFormer(encoder.width, sizes.bottleneck, sizes.adaptformer_scale)}


def _adapter(encoder: ViTEncoder, index: int, sizes: Sizes) -> dict[str, nn.Module]:
    return {"mlp": Adapter(encoder.width, sizes.bottleneck)}


def _lora(encoder: ViTEncoder, index: int, sizes: Sizes) -> dict[str, nn.Module]:
    return {site: Lora(encoder.width, encoder.width, sizes.bottleneck) for site in ("q", "v")}


def _lora_mlp(encoder: ViTEncoder, index: int, sizes: Sizes) -> dict[str, nn.Module]:
    inner, outer = encoder.mlp_width, encoder.width
    return {"fc1": Lora(outer, inner, sizes.bottleneck), "fc2": Lora(inner, outer, sizes.bottleneck)}


def _prompts(encoder: ViTEncoder, index: int, sizes: Sizes) -> dict[str, nn.Module]:
    return {"tokens": Prompts(sizes.prompts, encoder.width, encoder.patch_size)}


def _ssf(*sites: str) -> Callable[[ViTEncoder, int, Sizes], dict[str, nn.Module]]:
    """Scale and shift at the named sites."""
    return lambda encoder, index, sizes: {
        site: Ssf(encoder.mlp_width if site == "fc1" else encoder.width) for site in sites
    }


def _mask(encoder: ViTEncoder, index: int, sizes: Sizes) -> dict[str, nn.Module]:
    return {name: Mask(layer, sizes.mask_ratio, sizes.draw) for name, layer in encoder.layers(index).items()}


def _biases(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for name, parameter in module.named_parameters() if name.endswith("bias"))


def _of(kind: type[nn.Module]) -> Callable[[nn.Module], Iterator[nn.Parameter]]:
    """The parameters of all modules of a kind."""
    return lambda module: (
        parameter
        for submodule in module.modules()
        if isinstance(submodule, kind)
        for parameter in submodule.parameters()
    )


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
    """LIFT's rule for the LoRA rank and the width of adapters: r = 2^max(0, ⌊log2(C / 2L)⌋).

    Tuners then stay smaller than the head.

    Args:
        num_classes: number C of classes.
        depth: number L of blocks.
    """
    return 2 ** max(0, int(math.log2(num_classes / (2 * max(1, depth)))))


def mask_ratio(num_classes: int, depth: int, width: int) -> float:
    """LIFT's rule for the share of weights that `mask` trains: ρ = C / 12LD in whole thousandths, at least one.

    About as many parameters then train as the head has.

    Args:
        num_classes: number C of classes.
        depth: number L of blocks.
        width: width D of the transformer.
    """
    return max(1, 1000 * num_classes // (12 * max(1, depth) * width)) / 1000


def add_tuners(
    encoder: Encoder, names: Sequence[str], sizes: Sizes, partial: int | Sequence[int] | None = None, seed: int = 0
) -> None:
    """Freeze the encoder, then let the named tuners act on the blocks of `partial`.

    Args:
        encoder: the encoder; it is changed in place.
        names: entries of TUNERS.
        sizes: the numbers that the tuners are built from.
        partial: the blocks, see `Encoder.block_range`.
        seed: seed of the tuners' initial weights.

    Raises:
        UserError: two kinds of prompts; a tuner that finds nothing to train; blocks that the network does not have; a
            share that is not above 0 and up to 1; experts with blocks of their own in which no tuner acts.
    """
    if {"vpt_shallow", "vpt_deep"} <= set(names):
        raise UserError("vpt_shallow and vpt_deep both set the prompt tokens; choose one of them")
    if "mask" in names and not 0 < sizes.mask_ratio <= 1:
        raise UserError(f"mask_ratio {sizes.mask_ratio} is no share of the weights; choose one above 0 and up to 1")
    blocks, sizes = encoder.block_range(partial), replace(sizes)  # a copy, whose random generator starts anew
    encoder.requires_grad_(False)
    for name in (name for name in TUNERS if name in names):
        tuner = TUNERS[name]
        if tuner.insert is not None:
            _insert(encoder, name, blocks[:1] if tuner.first_only else blocks, sizes, seed)
        if tuner.select is not None:
            _select(encoder, name, partial)
    count = len(encoder.expert_blocks)
    if isinstance(encoder, ViTEncoder) and count and not any(any(s.values()) for s in encoder.sites[0][-count:]):
        raise UserError(
            f"expert_split {count}: no tuner acts in the last {count} blocks, so the experts would not differ there; "
            "turn one on (adaptformer, lora …) or widen partial, or set expert_split 0"
        )


def _insert(encoder: Encoder, name: str, blocks: range, sizes: Sizes, seed: int) -> None:
    tuner = TUNERS[name]
    assert tuner.insert is not None
    if isinstance(encoder, WholeNetworkEncoder) and tuner.on_feature is not None:
        if blocks or not encoder.depth:  # the feature comes after the last block, whichever blocks are chosen
            with seeded(seed, "tuner", name):
                encoder.insert(name, tuner.on_feature(encoder.feature_dim))
        return
    if not isinstance(encoder, ViTEncoder):
        others = ", ".join(other for other, entry in TUNERS.items() if entry.select or entry.on_feature)
        raise UserError(f"{name} acts inside the blocks of a ViT, and this backbone runs as a whole; it takes {others}")
    later = [
        replace(sizes, mask_seed=derive_seed(sizes.mask_seed, "expert", expert)) for expert in range(1, encoder.experts)
    ]
    for index in blocks:
        per_expert = index >= encoder.depth - encoder.num_expert_blocks
        with seeded(seed, "tuner", name, index):
            modules = tuner.insert(encoder, index, sizes)
            encoder.insert(name, index, modules, tuner.on_weights, 0 if per_expert else None)
        for expert, drawn in enumerate(later if per_expert else [], start=1):
            with seeded(seed, "tuner", name, index, expert):  # the first expert starts as a single one would
                encoder.insert(name, index, tuner.insert(encoder, index, drawn), tuner.on_weights, expert)


def _select(encoder: Encoder, name: str, partial: int | Sequence[int] | None) -> None:
    select = TUNERS[name].select
    assert select is not None
    modules = encoder.tunable_modules(partial)
    refuse_expert_blocks(encoder, name, modules)
    selected = [parameter for module in modules for parameter in select(module)]
    if modules and not selected:
        raise UserError(f"{name} finds nothing to train in this backbone")
    for parameter in selected:
        parameter.requires_grad_(True)
    if TUNERS[name].on_batch:
        submodules = (submodule for module in modules for submodule in module.modules())
        encoder.set_trained_batch_norms([norm for norm in submodules if isinstance(norm, nn.BatchNorm2d)])
