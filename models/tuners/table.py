"""TUNERS: which parameters train while the backbone is frozen. A tuner's name is its flag on the command line.

A tuner inserts modules at the sites of a transformer's blocks (`transformer_encoder.py` lists the sites), selects
weights of the backbone, or acts on the feature of a backbone that runs as a whole. Tuners can be combined; at a shared
site they act in the order of the table. `partial` holds for all of them (LIFT ignores it for biases, norms and shallow
prompts), but for a tuner whose option `<tuner>_layers` names other blocks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tailtune.configs.errors import UserError
from tailtune.configs.seeding import seeded
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.expert_split import refuse_expert_blocks
from tailtune.models.backbones.folded_norms import refuse_folded_norms
from tailtune.models.backbones.transformer_encoder import TransformerEncoder
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.models.backbones.whole_network_encoder import WholeNetworkEncoder
from tailtune.models.tuners.tuner_modules import (
    Adapter,
    AdaptFormer,
    ClipLora,
    Lora,
    Mask,
    Prompts,
    Ssf,
    TensorMasks,
    TextPrompts,
)
from tailtune.models.tuners.tuner_options import (
    AdapterOptions,
    AdaptFormerOptions,
    AftOptions,
    BottleneckOptions,
    ClipLoraOptions,
    LoraOptions,
    MaskOptions,
    PromptOptions,
    TunerOptions,
)


@dataclass(frozen=True)
class Tuner:
    """What a tuner does to an encoder: it inserts modules or selects parameters; exactly one of the two is given.

    insert: (encoder, index of a block, options) → site → module.
    select: module → those of its parameters that train. It is called with the blocks of `partial`, or with the whole
        network.
    """

    doc: str
    """A sentence that says what its flag does."""
    insert: Callable[[TransformerEncoder, int, Any], dict[str, nn.Module]] | None = None
    select: Callable[[nn.Module], Iterable[nn.Parameter]] | None = None
    options: TunerOptions = TunerOptions()
    """Its options with their defaults. Those without a `key` of their own are called `<tuner>_<field>`."""
    on_feature: Callable[[int], nn.Module] | None = None
    """Width of the feature → the module that acts on the feature of a backbone that runs as a whole."""
    first_only: bool = False
    """Whether it is inserted at the first block of `partial` only."""
    on_weights: bool = False
    """Whether it is inserted at the weights of layers instead of their outputs."""
    on_batch: bool = False
    """Whether the selected batch norms use the statistics of the batch and update their running ones."""
    draws: bool = False
    """Whether it can draw random numbers in training, which then depend on the images that a process holds at once."""

    def blocks_of(self, encoder: Encoder, options: TunerOptions, partial: int | Sequence[int] | None) -> list[int]:
        """Indices of the blocks that the tuner acts on.

        Args:
            encoder: the encoder.
            options: the tuner's options.
            partial: the blocks of all tuners, see `Encoder.block_range`.

        Raises:
            UserError: blocks that the network does not have.
        """
        own = options.layers
        blocks = [*encoder.block_range(partial)] if own is None else encoder.listed_blocks(own)
        return blocks[:1] if self.first_only else blocks


def _adaptformer(encoder: TransformerEncoder, index: int, options: AdaptFormerOptions) -> dict[str, nn.Module]:
    scale = None if isinstance(options.scale, str) else options.scale
    return {"mlp": AdaptFormer(encoder.width, options.bottleneck, scale, options.init == "uniform")}


def _adapter(encoder: TransformerEncoder, index: int, options: AdapterOptions) -> dict[str, nn.Module]:
    return {"mlp": Adapter(encoder.width, options.bottleneck, options.init == "uniform")}


def _lora(encoder: TransformerEncoder, index: int, options: BottleneckOptions) -> dict[str, nn.Module]:
    rank = options.bottleneck
    return {site: Lora(encoder.width, encoder.width, rank) for site in ("q", "v")}


def _clip_lora(encoder: TransformerEncoder, index: int, options: ClipLoraOptions) -> dict[str, nn.Module]:
    sizes = (encoder.width, options.rank, options.alpha, options.dropout)
    return {site: ClipLora(*sizes) for site in options.sites}


def _lora_mlp(encoder: TransformerEncoder, index: int, options: BottleneckOptions) -> dict[str, nn.Module]:
    width, mlp_width, rank = encoder.width, encoder.mlp_width, options.bottleneck
    return {"fc1": Lora(width, mlp_width, rank), "fc2": Lora(mlp_width, width, rank)}


def _prompts(encoder: TransformerEncoder, index: int, options: PromptOptions) -> dict[str, nn.Module]:
    assert options.length is not None, "filled"
    if isinstance(encoder, ViTEncoder):
        patch_size = None if options.init == "normal" else encoder.patch_size
        return {"tokens": Prompts(options.length, encoder.width, patch_size)}
    return {"tokens": TextPrompts(options.length, encoder.width)}


def _ssf(*sites: str) -> Callable[[TransformerEncoder, int, TunerOptions], dict[str, nn.Module]]:
    """Inserts scale and shift at some sites."""
    return lambda encoder, index, options: {
        site: Ssf(encoder.mlp_width if site == "fc1" else encoder.width) for site in sites
    }


def _mask(encoder: TransformerEncoder, index: int, options: MaskOptions) -> dict[str, nn.Module]:
    assert options.ratio is not None, "filled"
    return {name: Mask(layer, options.ratio, options.draw) for name, layer in encoder.layers(index).items()}


def _aft(encoder: TransformerEncoder, index: int, options: AftOptions) -> dict[str, nn.Module]:
    assert options.ratio is not None, "filled"
    layers = encoder.layers(index)
    return {name: TensorMasks(layers[name], options.ratio, options.seed) for name in options.in_layers}


def _biases(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for name, parameter in module.named_parameters() if name.endswith("bias"))


def _parameters_of(module_class: type[nn.Module]) -> Callable[[nn.Module], Iterator[nn.Parameter]]:
    """Selects the parameters of all modules of a class."""
    return lambda module: (
        parameter
        for submodule in module.modules()
        if isinstance(submodule, module_class)
        for parameter in submodule.parameters()
    )


TUNERS: dict[str, Tuner] = {
    "full_tuning": Tuner("The blocks themselves train.", select=nn.Module.parameters),
    "bias_tuning": Tuner("The biases of the blocks train.", select=_biases),
    "ln_tuning": Tuner("The layer norms of the blocks train.", select=_parameters_of(nn.LayerNorm)),
    "bn_tuning": Tuner(
        "The batch norms of a convolutional network train.", select=_parameters_of(nn.BatchNorm2d), on_batch=True
    ),
    "mask": Tuner(
        "A random subset of the weights of the blocks' linear layers trains.",
        insert=_mask,
        options=MaskOptions(),
        on_weights=True,
    ),
    "aft": Tuner(
        "A random subset of each weight and each bias of the blocks' linear layers trains, drawn as in LIFT+.",
        insert=_aft,
        options=AftOptions(),
        on_weights=True,
    ),
    "vpt_shallow": Tuner(
        "Trained prompt tokens enter before the first block.",
        insert=_prompts,
        options=PromptOptions(),
        first_only=True,
    ),
    "vpt_deep": Tuner("New trained prompt tokens enter before every block.", _prompts, options=PromptOptions()),
    "lora": Tuner("Low-rank updates of query and value train (LoRA).", _lora, options=LoraOptions()),
    "lora_mlp": Tuner("Low-rank updates of the MLP's layers train (LoRA).", _lora_mlp, options=BottleneckOptions()),
    "clip_lora": Tuner(
        "Low-rank updates of the attention's matrices train, with dropout (CLIP-LoRA).",
        _clip_lora,
        options=ClipLoraOptions(),
        draws=True,
    ),
    "ssf_attn": Tuner(
        "Scale and shift of the attention's layers train; in a CLIP ResNet, scale and shift of its feature.",
        insert=_ssf("q", "k", "v", "proj"),
        on_feature=Ssf,
    ),
    "ssf_mlp": Tuner("Scale and shift of the MLP's layers train.", insert=_ssf("fc1", "fc2")),
    "ssf_ln": Tuner("Scale and shift after the layer norms train.", insert=_ssf("norm1", "norm2")),
    "adapter": Tuner("A bottleneck layer after the MLP trains.", _adapter, options=AdapterOptions()),
    "adaptformer": Tuner(
        "A bottleneck layer in parallel to the MLP trains.", _adaptformer, options=AdaptFormerOptions()
    ),
}


def add_tuners(
    encoder: Encoder,
    options: Mapping[str, TunerOptions],
    partial: int | Sequence[int] | None = None,
    seed: int = 0,
) -> None:
    """Freeze the encoder, then let tuners act on the blocks of `partial`.

    Args:
        encoder: the encoder; it is changed in place.
        options: entry of TUNERS → its options, in which no size is open (`TunerOptions.filled`).
        partial: the blocks, see `Encoder.block_range`.
        seed: seed of the tuners' initial weights.

    Raises:
        UserError: two kinds of prompts; a tuner that finds nothing to train; blocks that the network does not have; a
            share that is not above 0 and up to 1; experts with blocks of their own in which no tuner acts.
    """
    if {"vpt_shallow", "vpt_deep"} <= options.keys():
        raise UserError("vpt_shallow and vpt_deep both set the prompt tokens; choose one of them")
    for tuner_options in options.values():
        tuner_options.check()
    encoder.block_range(partial)  # refuses blocks that are not there, also without a tuner
    encoder.requires_grad_(False)
    for name in (name for name in TUNERS if name in options):
        tuner = TUNERS[name]
        blocks = encoder.tuned_blocks[name] = tuner.blocks_of(encoder, options[name], partial)
        if tuner.insert is not None:
            _insert(encoder, name, blocks, options[name], seed)
        if tuner.select is not None:
            everywhere = partial is None and options[name].layers is None
            modules = encoder.tunable_modules(None) if everywhere else [encoder.blocks[index] for index in blocks]
            _select(encoder, name, modules)
    encoder.tuners_draw = any(each.draws for each in options.values())
    count = len(encoder.expert_blocks)
    if (
        isinstance(encoder, TransformerEncoder)
        and count
        and not any(any(s.values()) for s in encoder.sites[0][-count:])
    ):
        raise UserError(
            f"expert_split {count}: no tuner acts in the last {count} blocks, so the experts would not differ there; "
            "turn one on (adaptformer, lora …) or widen partial, or set expert_split 0"
        )


def _insert(encoder: Encoder, name: str, blocks: Sequence[int], options: TunerOptions, seed: int) -> None:
    """Insert the modules of a tuner; in blocks that experts have for themselves, one set for each expert."""
    tuner = TUNERS[name]
    assert tuner.insert is not None
    if isinstance(encoder, WholeNetworkEncoder) and tuner.on_feature is not None:
        if blocks or not encoder.depth:  # the feature comes after the last block, whichever blocks are chosen
            with seeded(seed, "tuner", name):
                encoder.insert(name, tuner.on_feature(encoder.feature_dim))
        return
    if not isinstance(encoder, TransformerEncoder):
        others = ", ".join(other for other, entry in TUNERS.items() if entry.select or entry.on_feature)
        raise UserError(f"{name} acts inside the blocks of a ViT, and this backbone runs as a whole; it takes {others}")
    first = replace(options)  # a copy, whose random generator starts anew
    later = [options.of_expert(expert) for expert in range(1, encoder.experts)]
    for index in blocks:
        per_expert = index >= encoder.depth - encoder.num_expert_blocks
        with seeded(seed, "tuner", name, index):
            modules = tuner.insert(encoder, index, first)
            if not any(parameter.numel() for module in modules.values() for parameter in module.parameters()):
                raise UserError(f"{name} trains nothing in a block: {name}_ratio is too small; choose a larger share")
            encoder.insert(name, index, modules, tuner.on_weights, 0 if per_expert else None)
        for expert, of_expert in enumerate(later if per_expert else [], start=1):
            with seeded(seed, "tuner", name, index, expert):  # the first expert starts as a single one would
                encoder.insert(name, index, tuner.insert(encoder, index, of_expert), tuner.on_weights, expert)


def _select(encoder: Encoder, name: str, modules: Sequence[nn.Module]) -> None:
    """Let the parameters of modules train that a tuner selects."""
    select = TUNERS[name].select
    assert select is not None
    refuse_expert_blocks(encoder, name, modules)
    selected = [parameter for module in modules for parameter in select(module)]
    if modules and not selected:
        raise UserError(f"{name} finds nothing to train in this backbone")
    for parameter in selected:
        parameter.requires_grad_(True)
    if TUNERS[name].on_batch:
        submodules = (submodule for module in modules for submodule in module.modules())
        norms = [norm for norm in submodules if isinstance(norm, nn.BatchNorm2d)]
        refuse_folded_norms(norms, name)
        encoder.set_trained_batch_norms(norms)
