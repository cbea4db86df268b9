"""TUNERS: what of a frozen backbone trains. A tuner's flag on the command line is its name in the table.

A tuner inserts modules at the sites of a ViT's blocks, selects weights of the backbone, or acts on the feature of a
backbone without blocks. Tuners combine; at a shared site they act in the order of the table. `partial` holds for
every one of them (LIFT ignores it for biases, norms and shallow prompts).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tailtune.configs.errors import UserError
from tailtune.configs.seeding import seeded
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.expert_split import refuse_divided
from tailtune.models.backbones.generic import GenericEncoder
from tailtune.models.backbones.vit import ViT
from tailtune.models.tuners.modules import Adapter, AdaptFormer, Lora, Mask, Prompts, Ssf
from tailtune.models.tuners.tuner_options import (
    AdaptFormerOptions,
    BottleneckOptions,
    MaskOptions,
    PromptOptions,
    TunerOptions,
)


@dataclass(frozen=True)
class Tuner:
    """What it does to a host; exactly one of insert and select is given.

    insert: (ViT, index of a block, options) → site → module.
    select: module → the parameters of it that train; of the blocks, or of any other backbone as a whole.
    """

    doc: str
    """Meaning of its flag, a sentence."""
    insert: Callable[[ViT, int, Any], dict[str, nn.Module]] | None = None
    select: Callable[[nn.Module], Iterable[nn.Parameter]] | None = None
    options: TunerOptions = TunerOptions()
    """Its options with their defaults; those without a `key` of their own are called `<tuner>_<field>`."""
    on_feature: Callable[[int], nn.Module] | None = None
    """Width → what it puts on the feature of a backbone that runs as a whole, in place of `insert`."""
    first_only: bool = False
    """Inserted at the first block of the range only."""
    on_weights: bool = False
    """Inserted at the weights of layers instead of their outputs."""
    on_batch: bool = False
    """Selected batch norms train on the statistics of the batch and update their running ones."""


def _adaptformer(host: ViT, index: int, options: AdaptFormerOptions) -> dict[str, nn.Module]:
    scale = None if isinstance(options.scale, str) else options.scale
    return {"mlp": AdaptFormer(host.width, options.bottleneck, scale)}


def _adapter(host: ViT, index: int, options: BottleneckOptions) -> dict[str, nn.Module]:
    return {"mlp": Adapter(host.width, options.bottleneck)}


def _lora(host: ViT, index: int, options: BottleneckOptions) -> dict[str, nn.Module]:
    return {site: Lora(host.width, host.width, options.bottleneck) for site in ("q", "v")}


def _lora_mlp(host: ViT, index: int, options: BottleneckOptions) -> dict[str, nn.Module]:
    inner, outer = host.hidden_width, host.width
    return {"fc1": Lora(outer, inner, options.bottleneck), "fc2": Lora(inner, outer, options.bottleneck)}


def _prompts(host: ViT, index: int, options: PromptOptions) -> dict[str, nn.Module]:
    assert options.length is not None, "filled"
    return {"tokens": Prompts(options.length, host.width, host.patch_size)}


def _ssf(*sites: str) -> Callable[[ViT, int, TunerOptions], dict[str, nn.Module]]:
    """Scale and shift at the named sites."""
    return lambda host, index, options: {
        site: Ssf(host.hidden_width if site == "fc1" else host.width) for site in sites
    }


def _mask(host: ViT, index: int, options: MaskOptions) -> dict[str, nn.Module]:
    assert options.ratio is not None, "filled"
    return {name: Mask(layer, options.ratio, options.draw) for name, layer in host.layers(index).items()}


def _biases(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for name, parameter in module.named_parameters() if name.endswith("bias"))


def _of(kind: type[nn.Module]) -> Callable[[nn.Module], Iterator[nn.Parameter]]:
    """The parameters of all modules of a kind."""
    return lambda module: (each for part in module.modules() if isinstance(part, kind) for each in part.parameters())


TUNERS: dict[str, Tuner] = {
    "full_tuning": Tuner("The blocks themselves train.", select=nn.Module.parameters),
    "bias_tuning": Tuner("The biases of the blocks train.", select=_biases),
    "ln_tuning": Tuner("The layer norms of the blocks train.", select=_of(nn.LayerNorm)),
    "bn_tuning": Tuner("The batch norms of a convolutional network train.", select=_of(nn.BatchNorm2d), on_batch=True),
    "mask": Tuner(
        "A random subset of the weights of the blocks' linear layers trains.",
        insert=_mask,
        options=MaskOptions(),
        on_weights=True,
    ),
    "vpt_shallow": Tuner(
        "Trained prompt tokens enter before the first block.",
        insert=_prompts,
        options=PromptOptions(),
        first_only=True,
    ),
    "vpt_deep": Tuner("New trained prompt tokens enter before every block.", _prompts, options=PromptOptions()),
    "lora": Tuner("Low-rank updates of query and value train (LoRA).", _lora, options=BottleneckOptions()),
    "lora_mlp": Tuner("Low-rank updates of the MLP's layers train (LoRA).", _lora_mlp, options=BottleneckOptions()),
    "ssf_attn": Tuner(
        "Scale and shift of the attention's layers train; in a CLIP ResNet, scale and shift of its feature.",
        insert=_ssf("q", "k", "v", "proj"),
        on_feature=Ssf,
    ),
    "ssf_mlp": Tuner("Scale and shift of the MLP's layers train.", insert=_ssf("fc1", "fc2")),
    "ssf_ln": Tuner("Scale and shift behind the layer norms train.", insert=_ssf("norm1", "norm2")),
    "adapter": Tuner("A bottleneck layer behind the MLP trains.", _adapter, options=BottleneckOptions()),
    "adaptformer": Tuner("A bottleneck layer beside the MLP trains.", _adaptformer, options=AdaptFormerOptions()),
}


def add_tuners(
    host: Encoder,
    options: Mapping[str, TunerOptions],
    partial: int | Sequence[int] | None = None,
    seed: int = 0,
) -> None:
    """Freeze the host, then make tuners act on the blocks of `partial`.

    Args:
        options: name → filled options, of the tuners that act.
        partial: the last so many blocks, or the first and the end of a range; None: all.
        seed: of the tuners' initial weights.

    Raises:
        UserError: two kinds of prompts, a tuner that finds nothing to act on, a range beyond the network, or a
            share of weights beyond all of them; experts whose own blocks would not differ.
    """
    if {"vpt_shallow", "vpt_deep"} <= options.keys():
        raise UserError("vpt_shallow and vpt_deep both own the prompt tokens; choose one of them")
    for chosen in options.values():
        chosen.check()
    blocks = host.chosen(partial)
    host.requires_grad_(False)
    for name in (name for name in TUNERS if name in options):
        tuner = TUNERS[name]
        if tuner.insert is not None:
            _insert(host, name, blocks[:1] if tuner.first_only else blocks, options[name], seed)
        if tuner.select is not None:
            _select(host, name, partial)
    if isinstance(host, ViT) and host.own and not any(any(sites.values()) for sites in host.sites[0][-host.own :]):
        raise UserError(
            f"expert_split {host.own}: no tuner acts in the last {host.own} blocks, which experts would only repeat; "
            "turn one on (adaptformer, lora …) or widen partial, or set expert_split 0"
        )


def _insert(host: Encoder, name: str, blocks: range, options: TunerOptions, seed: int) -> None:
    tuner = TUNERS[name]
    assert tuner.insert is not None
    if isinstance(host, GenericEncoder) and tuner.on_feature is not None:
        if blocks or not host.depth:  # behind the last part, whichever the others are
            with seeded(seed, "tuner", name):
                host.insert(name, tuner.on_feature(host.feature_dim))
        return
    if not isinstance(host, ViT):
        others = ", ".join(other for other, entry in TUNERS.items() if entry.select or entry.on_feature)
        raise UserError(f"{name} acts inside the blocks of a ViT, and this backbone runs as a whole; it takes {others}")
    first = replace(options)  # a copy, whose random draw begins anew
    later = [options.of_expert(expert) for expert in range(1, host.experts)]
    for index in blocks:
        own = index >= host.depth - host.own
        with seeded(seed, "tuner", name, index):
            host.insert(name, index, tuner.insert(host, index, first), tuner.on_weights, 0 if own else None)
        for expert, copy in enumerate(later if own else [], start=1):
            with seeded(seed, "tuner", name, index, expert):  # the first one starts as if it were alone
                host.insert(name, index, tuner.insert(host, index, copy), tuner.on_weights, expert)


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
