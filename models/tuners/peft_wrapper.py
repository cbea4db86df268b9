"""`add_peft`: a tuner of the peft library around layers of an image encoder.

peft wraps layers in place and trains what it puts around them, beside whatever our own tuners select. What it would do
wrong here is refused with the reason, on the meta device already.
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
from tailtune.configs.seeding import seeded
from tailtune.configs.time_limit import time_limit
from tailtune.models.backbones.encoder import Encoder, tensors_of
from tailtune.models.backbones.expert_split import refuse_divided
from tailtune.models.tuners.peft_adapter import AdaLora, PeftAdapter
from tailtune.models.tuners.peft_types import FIELDS, INITS, PEFTS, Kind, draws, find

if TYPE_CHECKING:  # it takes more than a second to import, so only who asks for it pays
    from peft import PeftConfig, PeftModel


MOST = 10**6
"""The largest whole number in `peft_args` that is no seed: ranks and sizes, some of which are drawn at once."""
ATTENTION = (
    "peft merges and unmerges the weights of nn.MultiheadAttention in every forward, which moves frozen bf16 weights "
    "by 2e-3 and computes their full gradient; choose other target_modules, or a timm backbone, whose qkv is one Linear"
)


def add_peft(
    host: Encoder,
    name: str,
    args: Mapping[str, Any],
    partial: int | Sequence[int] | None,
    resolution: int,
    seed: int,
) -> PeftAdapter:
    """Wrap layers of the host with a tuner of peft, beside what other tuners have selected before.

    Args:
        args: fields of peft's configuration of that tuner.
        partial: parts of the host whose layers may be wrapped.
        resolution: side of the images, in pixels.

    Raises:
        UserError: what peft, or this host, cannot do.
    """
    kind = find(name)
    config: Any = _config(kind, name, args)
    _aim(config, host, name, kind, partial)
    selected = {key for key, each in host.named_parameters() if each.requires_grad}
    for layer in map(host.net.get_submodule, config.target_modules):
        if any(each.requires_grad for each in layer.parameters()):
            _let_train(layer, name, kind)
        layer.weight.data = layer.weight.data.contiguous()  # peft views weights of convolutions as matrices
    targets = list(config.target_modules)
    refuse_divided(host, f"peft {name}", map(host.net.get_submodule, targets))
    with seeded(seed, "peft"):
        model = _inject(host.net, config, kind.sampled, name)
    for key, parameter in host.named_parameters():  # peft has frozen all that is not its own
        if key.replace(".base_layer.", ".") in selected:
            parameter.requires_grad_(True)
    host.adapted = [host.net.get_submodule(each) for each in targets]
    host.noisy = draws(args)
    _check_called(host, targets, name, resolution)
    return (AdaLora if kind.type == "ADALORA" else PeftAdapter)(name, model, targets, args)


def _config(kind: Kind, name: str, args: Mapping[str, Any]) -> "PeftConfig":
    """peft's configuration, with the fields that make no sense here refused."""
    from peft import __version__
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {each.value: config for each, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind.type not in known:
        raise UserError(f"peft {name} is not in the installed peft {__version__}; install a newer one")
    names = [each.name for each in fields(known[kind.type])]
    for key, value in args.items():
        if key not in names:
            raise unknown(f"field of {name} in peft_args", key, [each for each in names if each not in FIELDS])
        if key in FIELDS and value not in (None, "none"):
            raise UserError(f"peft_args {key} cannot be set here: {FIELDS[key]}")
        if key == "target_modules" and value in ("", []):
            raise UserError("peft_args target_modules is empty: name layers, or leave it out for the usual ones")
        for number in _numbers(value):
            if abs(number) > MOST and not key.endswith(("seed", "key")):
                raise UserError(f"peft_args {key} is {number}, beyond {MOST:,}, which nothing needs; choose less")
    if args.get("init_lora_weights", True) not in INITS:
        raise UserError(
            f"peft_args init_lora_weights {args['init_lora_weights']} would alter the pre-trained weights or read the "
            "data; choose gaussian, orthogonal, or leave it out"
        )
    with _refusals(name):
        config: Any = known[kind.type](**{**kind.args, **args})
        if kind.type == "ADALORA" and config.target_r >= config.init_r:
            raise ValueError(f"target_r {config.target_r} must be less than init_r {config.init_r}")
    return config


def _numbers(value: Any) -> list[int]:
    """The whole numbers of a field: one, or those within a list or mapping."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [each for each in inside if type(each) is int]


def _aim(config: Any, host: Encoder, name: str, kind: Kind, partial: int | Sequence[int] | None) -> None:
    """Write the full names of the layers into the configuration: those that it matches, within `partial`."""
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = {key: each for key, each in host.net.named_modules() if key}
    if config.target_modules is None:
        _set_defaults(config, host, kind)
    if str(config.target_modules).lower() == "all-linear":
        config.target_modules = set(_linears(host.net))
    within = {id(each) for index in host.chosen(partial) for each in host.parts[index].modules()}
    with _refusals(name), time_limit(10, "comparing a pattern of layers with their names"):
        found = [key for key in modules if check_target_module_exists(config, key)]
    found = [key for key in found if partial is None or id(modules[key]) in within]
    types = (nn.Linear, nn.Conv2d) if kind.conv else (nn.Linear,)
    able = f"; {', '.join(each for each, entry in PEFTS.items() if entry.conv)} take convolutions"
    if not found:
        layers = sorted({key.split(".")[-1] for key, each in modules.items() if isinstance(each, types)})
        narrowed = [key for key in ("exclude_modules", "layers_to_transform") if getattr(config, key, None)]
        where = "" if partial is None else f" within partial {partial}"
        where += f" that {' and '.join(narrowed)} leaves" if narrowed else ""
        hint = " (a text is a pattern of the whole name)" if isinstance(config.target_modules, str) else ""
        raise UserError(
            f"peft_args target_modules {config.target_modules}{hint} is none of the layers of this backbone{where}; "
            f"{name} takes [{', '.join(layers)}]"
            if config.target_modules
            else f"peft {name} acts on linear layers, of which this backbone has none to offer{able}"
        )
    attention = _attentions(host.net)
    for key in found:
        if f"{key}.".startswith(attention):
            raise UserError(f"peft {name} on {key}: {ATTENTION}")
        if not isinstance(modules[key], types):
            hint = able if isinstance(modules[key], nn.Conv2d) else ""
            kind_of = type(modules[key]).__name__
            raise UserError(f"peft_args target_modules: peft {name} cannot act on {key}, a {kind_of}{hint}")
    config.target_modules = found
    if getattr(config, "feedforward_modules", None):  # IA3: layers whose input is scaled instead of the output
        outer = type(config)(target_modules=config.feedforward_modules, feedforward_modules=[])
        with _refusals(name), time_limit(10, "comparing feedforward_modules with the names of layers"):
            config.feedforward_modules = [key for key in found if check_target_module_exists(outer, key)]


def _set_defaults(config: Any, host: Encoder, kind: Kind) -> None:
    """The packed query, key and value; where there is none all linear layers, or all convolutions."""
    inside = host.parts or [host.net]
    names = [key.split(".")[-1] for part in inside for key in _linears(part)]
    if "qkv" in names:
        config.target_modules = ["qkv", "fc2"] if kind.type == "IA3" and "fc2" in names else ["qkv"]
    elif names or not kind.conv:
        config.target_modules = "all-linear"
    else:
        convolutions = {id(each) for part in inside for each in part.modules() if _dense(each)}
        config.target_modules = {key for key, each in host.net.named_modules() if id(each) in convolutions}
    if kind.type == "IA3" and config.feedforward_modules is None:
        config.feedforward_modules = [each for each in ("fc2",) if each in config.target_modules]


def _dense(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1


def _linears(net: nn.Module) -> list[str]:
    """Linear layers but for those that an nn.MultiheadAttention uses in its own way."""
    attention = _attentions(net)
    return [k for k, m in net.named_modules() if isinstance(m, nn.Linear) and not f"{k}.".startswith(attention)]


def _attentions(net: nn.Module) -> tuple[str, ...]:
    return tuple(f"{key}." for key, each in net.named_modules() if isinstance(each, nn.MultiheadAttention))


def _let_train(layer: nn.Module, name: str, kind: Kind) -> None:
    """Prepare a layer whose own weights are trained by another tuner."""
    if kind.frozen:
        raise UserError(
            f"peft {name} takes the weights of its layers as frozen, and another tuner trains them; leave that one "
            "out, or choose other target_modules"
        )
    if type(layer) is nn.Linear:
        layer.__class__ = _Casting


class _Casting(nn.Linear):
    """A wrapped layer whose own weights train, in fp32, below a narrower stream."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


def _inject(net: nn.Module, config: Any, sampled: bool, name: str) -> "PeftModel":
    """peft's own wrapper around the network, which it alters in place."""
    from peft import get_peft_model

    meta = any(each.is_meta for each in net.parameters())  # as every run tries it first; weights may take longer
    with (
        _refusals(name),
        time_limit(30, "wrapping the layers") if meta else nullcontext(),
        torch.device("cpu" if sampled or not meta else "meta"),
    ):
        if meta and sampled:
            for key in config.target_modules:
                net.get_submodule(key).to_empty(device="cpu")
        model: Any = get_peft_model(net, config)
        return model.to("meta") if meta else model


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """What peft says about what it was given, on one line; its warnings are about other uses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # of any class: peft checks values by using them
        reason = shorten(str(error), 200, placeholder=" …") or type(error).__name__
        raise UserError(f"peft {name} with these peft_args: {reason}") from error


def _check_called(host: Encoder, targets: Sequence[str], name: str, resolution: int) -> None:
    """Some networks read the weights of a layer without calling it, and a wrapper around it would do nothing.

    One image through the network without numbers, on the meta device, tells.
    """
    called: set[int] = set()
    hooks = [layer.register_forward_hook(lambda layer, *_: called.add(id(layer))) for layer in host.adapted]
    state = {key: torch.empty_like(each, device="meta") for key, each in tensors_of(host)}
    with host.untuned(), torch.no_grad():
        functional_call(host, state, (torch.empty(1, 3, resolution, resolution, device="meta"),), tie_weights=False)
    for key, layer, hook in zip(targets, host.adapted, hooks, strict=True):
        hook.remove()
        if id(layer) not in called:
            raise UserError(
                f"peft {name} on {key}: the network reads the weights of that layer without calling it; choose other "
                "target_modules"
            )
