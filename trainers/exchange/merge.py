"""`merged`: the tuned encoder as plain weights of its library, every tuner that is affine worked into them."""

import copy
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor

from configs.errors import UserError
from models.peft_adapter import merge
from models.vit import LAYERS, SITES, Sites, ViT
from models.vit_layers import at_site
from trainers.exchange.plain_net import network
from trainers.exchange.subject import Subject, linear_head, save_head, save_state

NORM_BEFORE = {"qkv": "norm1", "fc1": "norm2"}
WITHIN = "logits = net(images): it is part of the network"
State = dict[str, Tensor]


def check(subject: Subject) -> None:
    subject.refuse_experts("merged")
    host = subject.encoder
    outside = set(SITES) - {*NORM_BEFORE.values(), *LAYERS, *("q", "k", "v")}
    sites = {tuner: {site for each in blocks.values() for site in each} for tuner, blocks in _inserted(host).items()}
    lost = [tuner for tuner, own in sites.items() if own & outside]
    if lost:
        raise UserError(f"export merged: a plain network has no place for {', '.join(lost)}; `export onnx` keeps it")
    _feature_layer(subject)


def _inserted(host: Any) -> dict[str, Any]:
    """Tuner → block → site → module."""
    return dict(host.tuners.items()) if isinstance(host, ViT) else {}


@torch.no_grad()
def write(subject: Subject, folder: Path) -> dict[str, Any]:
    host, head = subject.encoder, linear_head(subject.head)
    within = head is not None and isinstance(host, ViT) and host.projection is None
    about = network(subject, len(subject.class_names) if within else 0)
    state = {about["prefix"] + name: each for name, each in merged(subject).items()}
    if head is not None and within:
        state |= {f"head.{name}": each for name, each in head.items()}
    else:
        save_head(subject, folder)
    save_state(state, folder / "model.safetensors")
    weights = 'safetensors.torch.load_file("model.safetensors")'
    if about["prefix"]:
        weights = f"{{name.removeprefix('{about['prefix']}'): each for name, each in {weights}.items()}}"
    facts = {"network": about, "load": f"{about['code']}\nnet.load_state_dict({weights})"}
    if within:
        facts["head"] = {"type": type(subject.head).__name__, "apply": WITHIN}
    return facts


def merged(subject: Subject) -> State:
    """The encoder's plain state dict with its tuners in it; our own are summed up in fp64."""
    host, peft = subject.encoder, subject.peft
    state = dict(merge(host, peft) if peft else host.base_state())
    if isinstance(host, ViT):
        for index, (name, path) in product(range(host.depth), LAYERS.items()):
            state |= _layer(host.sites[0][index], name, f"blocks.{index}.{path}", state)
    elif last := _feature_layer(subject):
        state |= _scaled(host, last, state)
    return state


def _layer(sites: Sites, name: str, path: str, state: State) -> State:
    """Weight and bias of what a linear layer and the tuners around it compute together.

    That is affine, so its values at zero and at the unit vectors say all, whatever the tuners are.
    """
    outputs = ("q", "k", "v") if name == "qkv" else (name,)
    norm, weights = NORM_BEFORE.get(name, "none"), f"{name}.weights"
    around = {
        site: [copy.deepcopy(each).double() for each in sites.get(site, [])] for site in (norm, weights, *outputs)
    }
    if not any(around.values()):
        return {}
    weight, bias = state[f"{path}.weight"].double(), state.get(f"{path}.bias")
    weight, bias = at_site(around[weights], (weight, None if bias is None else bias.double()), weight)

    def run(x: Tensor) -> Tensor:
        x = at_site(around[norm], x, x)
        parts = F.linear(x, weight, bias).chunk(len(outputs), dim=-1)
        return torch.cat([at_site(around[site], y, x) for site, y in zip(outputs, parts, strict=True)], dim=-1)

    shift = run(weight.new_zeros(1, weight.shape[1]))
    merged = (run(torch.eye(weight.shape[1], dtype=weight.dtype)) - shift).T
    probe = torch.randn(4, weight.shape[1], dtype=weight.dtype, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(run(probe), F.linear(probe, merged, shift[0])), f"a tuner at {path} is not affine"
    if bias is None and shift.any():
        raise UserError(f"export merged: {path} has no bias that could take a tuner's shift; `export onnx` keeps it")
    return {f"{path}.weight": merged} | ({} if bias is None else {f"{path}.bias": shift[0]})


def _scaled(host: Any, name: str, state: State) -> State:
    """The last layer with what the tuners do to each entry of its output."""
    modules = [copy.deepcopy(each).double() for each in host.tuners.values()]
    ones = torch.ones(host.feature_dim, dtype=torch.float64)
    shift = at_site(modules, 0 * ones, ones)
    scale = at_site(modules, ones, ones) - shift
    weight, bias = (state[f"{name}.{part}"].double() for part in ("weight", "bias"))
    return {f"{name}.weight": weight * scale.unsqueeze(1), f"{name}.bias": bias * scale + shift}


def _feature_layer(subject: Subject) -> str | None:
    """The layer that makes the feature and takes what tuners do to it; None where none acts on it."""
    host = subject.encoder
    if isinstance(host, ViT) or not len(host.tuners):
        return None
    if not isinstance(host.net, ModifiedResNet):
        raise UserError(f"export merged: no linear layer could take {', '.join(host.tuners)}; `export onnx` keeps it")
    return "attnpool.c_proj"
