"""`add_peft`: wraps layers of an image encoder with a tuner of the peft library.

peft changes the network in place and trains what it puts around its layers; our own tuners may train other weights at
the same time. What peft would do wrongly on an image encoder is refused with the reason, already on the meta device.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tailtune.configs.errors import UserError, unknown
from tailtune.configs.schema import uses_dropout
from tailtune.configs.seeding import seeded
from tailtune.configs.time_limit import time_limit
from tailtune.models.backbones.encoder import Encoder, named_tensors
from tailtune.models.backbones.expert_split import refuse_expert_blocks
from tailtune.models.tuners.peft_adapter import AdaLora, PeftAdapter
from tailtune.models.tuners.peft_table import (
    LORA_INITS,
    PEFTS,
    REFUSED_FIELDS,
    PeftType,
    find_peft_type,
)

if TYPE_CHECKING:  # importing peft takes more than a second, so only runs that use it do so
    from peft import PeftConfig, PeftModel


LARGEST_NUMBER = 10**6
"""The largest whole number in `peft_args` except for seeds: tensors of some of these sizes are made at once."""
ATTENTION_REFUSED = (
    "peft merges and unmerges the weights of nn.MultiheadAttention in every forward, which moves frozen bf16 weights "
    "by 2e-3 and computes their full gradient; choose other target_modules, or a timm backbone, whose qkv is one Linear"
)


def add_peft(
    encoder: Encoder,
    name: str,
    args: Mapping[str, Any],
    partial: int | Sequence[int] | None,
    resolution: int,
    seed: int,
) -> PeftAdapter:
    """Wrap layers of an encoder with a tuner of peft. Other tuners have selected or inserted their parameters before.

    Args:
        encoder: the encoder; it is changed in place.
        name: an entry of PEFTS.
        args: fields of peft's configuration of that tuner.
        partial: the blocks whose layers may be wrapped, see `Encoder.block_range`.
        resolution: side of the images, in pixels.
        seed: seed of the adapter's initial weights.

    Raises:
        UserError: peft cannot do this, or not on this encoder.
    """
    peft_type = find_peft_type(name)
    config: Any = _peft_config(peft_type, name, args)
    _choose_target_modules(config, encoder, name, peft_type, partial)
    trained = {key for key, parameter in encoder.named_parameters() if parameter.requires_grad}
    for layer in map(encoder.net.get_submodule, config.target_modules):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            _prepare_trained_layer(layer, name, peft_type)
        layer.weight.data = layer.weight.data.contiguous()  # peft views weights of convolutions as matrices
    targets = list(config.target_modules)
    refuse_expert_blocks(encoder, f"peft {name}", map(encoder.net.get_submodule, targets))
    with seeded(seed, "peft"):
        model = _wrap(encoder.net, config, peft_type.sampled, name)
    for key, parameter in encoder.named_parameters():  # peft has frozen every parameter that is not its own
        if key.replace(".base_layer.", ".") in trained:
            parameter.requires_grad_(True)
    encoder.wrap_with_peft([encoder.net.get_submodule(target) for target in targets], uses_dropout(args))
    _check_called(encoder, targets, name, resolution)
    return (AdaLora if peft_type.type == "ADALORA" else PeftAdapter)(name, model, targets, args)


def _peft_config(peft_type: PeftType, name: str, args: Mapping[str, Any]) -> "PeftConfig":
    """peft's configuration. Raises a `UserError` for fields that make no sense here."""
    from peft import __version__
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config_classes = {peft_name.value: config for peft_name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if peft_type.type not in config_classes:
        raise UserError(f"peft {name} is not in the installed peft {__version__}; install a newer one")
    names = [field.name for field in fields(config_classes[peft_type.type])]
    for key, value in args.items():
        if key not in names:
            allowed = [known for known in names if known not in REFUSED_FIELDS]
            raise unknown(f"field of {name} in peft_args", key, allowed)
        if key in REFUSED_FIELDS and value not in (None, "none"):
            raise UserError(f"peft_args {key} cannot be set here: {REFUSED_FIELDS[key]}")
        if key == "target_modules" and value in ("", []):
            raise UserError("peft_args target_modules is empty: name layers, or leave it out for the usual ones")
        for number in _whole_numbers(value):
            if abs(number) > LARGEST_NUMBER and not key.endswith(("seed", "key")):
                raise UserError(f"peft_args {key} is {number}, beyond {LARGEST_NUMBER:,}; choose a smaller number")
    if args.get("init_lora_weights", True) not in LORA_INITS:
        raise UserError(
            f"peft_args init_lora_weights {args['init_lora_weights']} would alter the pre-trained weights or read the "
            "data; choose gaussian, orthogonal, or leave it out"
        )
    with _peft_errors(name):
        config: Any = config_classes[peft_type.type](**{**peft_type.args, **args})
        if peft_type.type == "ADALORA" and config.target_r >= config.init_r:
            raise ValueError(f"target_r {config.target_r} must be less than init_r {config.init_r}")
    return config


def _whole_numbers(value: Any) -> list[int]:
    """The whole numbers in a field: the value itself, or those in a list or mapping."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [number for number in values if type(number) is int]


def _choose_target_modules(
    config: Any, encoder: Encoder, name: str, peft_type: PeftType, partial: int | Sequence[int] | None
) -> None:
    """Write the full names of the layers to wrap into the configuration: those that it matches, within `partial`."""
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = {key: module for key, module in encoder.net.named_modules() if key}
    if config.target_modules is None:
        _set_default_targets(config, encoder, peft_type)
    if str(config.target_modules).lower() == "all-linear":
        config.target_modules = set(_linear_layers(encoder.net))
    blocks = [encoder.blocks[index] for index in encoder.block_range(partial)]
    within = {id(module) for block in blocks for module in block.modules()}
    with _peft_errors(name), time_limit(10, "comparing a pattern of layers with their names"):
        targets = [key for key in modules if check_target_module_exists(config, key)]
    targets = [key for key in targets if partial is None or id(modules[key]) in within]
    _check_targets(config, targets, modules, name, peft_type, partial)
    config.target_modules = targets
    if getattr(config, "feedforward_modules", None):  # IA3 scales the input of these layers instead of the output
        feedforward = type(config)(target_modules=config.feedforward_modules, feedforward_modules=[])
        with _peft_errors(name), time_limit(10, "comparing feedforward_modules with the names of layers"):
            config.feedforward_modules = [key for key in targets if check_target_module_exists(feedforward, key)]


def _check_targets(
    config: Any,
    targets: Sequence[str],
    modules: Mapping[str, nn.Module],
    name: str,
    peft_type: PeftType,
    partial: int | Sequence[int] | None,
) -> None:
    """Raise a `UserError` if there is no layer to wrap, or one that the tuner cannot wrap."""
    types = (nn.Linear, nn.Conv2d) if peft_type.conv else (nn.Linear,)
    for_convolutions = f"; {', '.join(peft for peft, entry in PEFTS.items() if entry.conv)} take convolutions"
    if not targets:
        layers = sorted({key.split(".")[-1] for key, module in modules.items() if isinstance(module, types)})
        narrowed = [key for key in ("exclude_modules", "layers_to_transform") if getattr(config, key, None)]
        where = "" if partial is None else f" within partial {partial}"
        where += f" that {' and '.join(narrowed)} leaves" if narrowed else ""
        hint = " (a text is a pattern of the whole name)" if isinstance(config.target_modules, str) else ""
        raise UserError(
            f"peft_args target_modules {config.target_modules}{hint} is none of the layers of this backbone{where}; "
            f"{name} takes [{', '.join(layers)}]"
            if config.target_modules
            else f"peft {name} acts on linear layers, and this backbone has none that it could wrap{for_convolutions}"
        )
    attention = _attention_prefixes(modules)
    for key in targets:
        if f"{key}.".startswith(attention):
            raise UserError(f"peft {name} on {key}: {ATTENTION_REFUSED}")
        if not isinstance(modules[key], types):
            hint = for_convolutions if isinstance(modules[key], nn.Conv2d) else ""
            class_name = type(modules[key]).__name__
            raise UserError(f"peft_args target_modules: peft {name} cannot act on {key}, a {class_name}{hint}")


def _set_default_targets(config: Any, encoder: Encoder, peft_type: PeftType) -> None:
    """Wrap the packed query, key and value; without these all linear layers, and without these all convolutions."""
    blocks = encoder.blocks or [encoder.net]
    names = [key.split(".")[-1] for block in blocks for key in _linear_layers(block)]
    if "qkv" in names:
        config.target_modules = ["qkv", "fc2"] if peft_type.type == "IA3" and "fc2" in names else ["qkv"]
    elif names or not peft_type.conv:
        config.target_modules = "all-linear"
    else:
        convolutions = {id(module) for block in blocks for module in block.modules() if _is_ungrouped_conv(module)}
        config.target_modules = {key for key, module in encoder.net.named_modules() if id(module) in convolutions}
    if peft_type.type == "IA3" and config.feedforward_modules is None:
        config.feedforward_modules = ["fc2"] if "fc2" in config.target_modules else []


def _is_ungrouped_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1


def _linear_layers(net: nn.Module) -> list[str]:
    """Names of the linear layers, without those within an nn.MultiheadAttention, which never calls them."""
    modules = dict(net.named_modules())
    attention = _attention_prefixes(modules)
    return [
        key for key, module in modules.items() if isinstance(module, nn.Linear) and not f"{key}.".startswith(attention)
    ]


def _attention_prefixes(modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """How the names of everything within an nn.MultiheadAttention begin."""
    return tuple(f"{key}." for key, module in modules.items() if isinstance(module, nn.MultiheadAttention))


def _prepare_trained_layer(layer: nn.Module, name: str, peft_type: PeftType) -> None:
    """Prepare a layer whose own weights are trained by another tuner."""
    if peft_type.frozen:
        raise UserError(
            f"peft {name} needs frozen weights in the layers that it wraps, and another tuner trains them; leave that "
            "tuner out, or choose other target_modules"
        )
    if type(layer) is nn.Linear:
        layer.__class__ = _CastingLinear


class _CastingLinear(nn.Linear):
    """A wrapped layer whose own weights train: they stay in fp32 and are cast to the dtype of the input."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


def _wrap(net: nn.Module, config: Any, sampled: bool, name: str) -> "PeftModel":
    """peft's own model around the network, which it changes in place."""
    from peft import get_peft_model

    # Every run wraps a network on the meta device first, so the time limit is checked there; weights may take longer.
    meta = any(parameter.is_meta for parameter in net.parameters())
    with (
        _peft_errors(name),
        time_limit(30, "wrapping the layers") if meta else nullcontext(),
        torch.device("cpu" if sampled or not meta else "meta"),
    ):
        if meta and sampled:
            for key in config.target_modules:
                net.get_submodule(key).to_empty(device="cpu")
        model: Any = get_peft_model(net, config)
        return model.to("meta") if meta else model


@contextmanager
def _peft_errors(name: str) -> Iterator[None]:
    """Turn any error of peft into a `UserError` on one line, and silence its warnings, which are for other uses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # of any class: peft checks values by using them
        reason = shorten(str(error), 200, placeholder=" …") or type(error).__name__
        raise UserError(f"peft {name} with these peft_args: {reason}") from error


def _check_called(encoder: Encoder, targets: Sequence[str], name: str, resolution: int) -> None:
    """Raise a `UserError` if the network reads the weights of a wrapped layer without ever calling the layer.

    The wrapper would then have no effect. One image, on the meta device, shows which layers are called.
    """
    called: set[int] = set()
    hooks = [layer.register_forward_hook(lambda layer, *_: called.add(id(layer))) for layer in encoder.peft_layers]
    state = {key: torch.empty_like(tensor, device="meta") for key, tensor in named_tensors(encoder)}
    with encoder.untuned(), torch.no_grad():
        image = torch.empty(1, 3, resolution, resolution, device="meta")
        functional_call(encoder, state, (image,), tie_weights=False)
    for key, layer, hook in zip(targets, encoder.peft_layers, hooks, strict=True):
        hook.remove()
        if id(layer) not in called:
            raise UserError(
                f"peft {name} on {key}: the network reads the weights of that layer without calling it; choose other "
                "target_modules"
            )
