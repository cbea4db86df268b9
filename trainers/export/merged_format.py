"""`merged`: the tuned encoder as plain weights of its library, every tuner that is affine worked into them."""

import copy
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.models.backbones.vit_encoder import LAYERS, SITES, Sites, ViTEncoder
from tailtune.models.backbones.vit_layers import apply_tuners
from tailtune.models.tuners.peft_adapter import merge
from tailtune.trainers.export.exported_model import ExportedModel, affine_of, linear_head, save_head, save_state
from tailtune.trainers.export.library_network import network
from tailtune.trainers.export.loading_code import HEAD_WITHIN, WITHIN, head_beside, how_to_load

NORM_BEFORE = {"qkv": "norm1", "fc1": "norm2"}
State = dict[str, Tensor]


def check(subject: ExportedModel) -> None:
    subject.refuse_experts("merged")
    host = subject.encoder
    outside = set(SITES) - {*NORM_BEFORE.values(), *LAYERS, *("q", "k", "v")}
    sites = {tuner: {site for each in blocks.values() for site in each} for tuner, blocks in _inserted(host).items()}
    lost = [tuner for tuner, own in sites.items() if own & outside]
    if lost:
        raise UserError(f"export merged: a plain network has no place for {', '.join(lost)}; `export onnx` keeps it")
    network(subject)


def _inserted(host: Any) -> dict[str, Any]:
    """Tuner → block → site → module."""
    return dict(host.tuners.items()) if isinstance(host, ViTEncoder) else {}


@torch.no_grad()
def write(subject: ExportedModel, folder: Path) -> dict[str, Any]:
    host, linear = subject.encoder, linear_head(subject.head)
    within = isinstance(host, ViTEncoder) and host.projection is None
    about = network(subject, len(subject.class_names) if linear and within else 0)
    state = {about["prefix"] + name: each for name, each in merged(subject).items()}
    weights = "load_file('model.safetensors')"
    if about["prefix"]:
        weights = f"{{name.removeprefix('{about['prefix']}'): each for name, each in {weights}.items()}}"
    code = f"{about['code']}\nnet.load_state_dict({weights})"
    if linear and within:
        state |= {f"head.{name}": each for name, each in linear.items()}
        head, facts = HEAD_WITHIN, {"head": {"type": type(subject.head).__name__, "apply": WITHIN}}
    else:
        save_head(subject, folder)
        head, facts = head_beside(subject), {}
    save_state(state, folder / "model.safetensors")
    return {"network": about, **facts, "how_to_load": how_to_load(code, head)}


def merged(subject: ExportedModel) -> State:
    """The encoder's plain state dict with its tuners in it; our own are summed up in fp64."""
    host, peft = subject.encoder, subject.peft
    state = dict(merge(host, peft) if peft else host.pretrained_state())
    if isinstance(host, ViTEncoder):
        for index, (name, path) in product(range(host.depth), LAYERS.items()):
            state |= _layer(host.sites[0][index], name, f"blocks.{index}.{path}", state)
    elif isinstance(host.net, ModifiedResNet) and len(host.tuners):
        state |= _scaled(host, "attnpool.c_proj", state)
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
    weight, bias = apply_tuners(around[weights], (weight, None if bias is None else bias.double()), weight)

    def run(x: Tensor) -> Tensor:
        x = apply_tuners(around[norm], x, x)
        parts = F.linear(x, weight, bias).chunk(len(outputs), dim=-1)
        return torch.cat([apply_tuners(around[site], y, x) for site, y in zip(outputs, parts, strict=True)], dim=-1)

    shift = run(weight.new_zeros(1, weight.shape[1]))
    merged = (run(torch.eye(weight.shape[1], dtype=weight.dtype)) - shift).T
    probe = torch.randn(4, weight.shape[1], dtype=weight.dtype, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(run(probe), F.linear(probe, merged, shift[0])), f"a tuner at {path} is not affine"
    if bias is None and shift.any():
        raise UserError(f"export merged: {path} has no bias that could take a tuner's shift; `export onnx` keeps it")
    return {f"{path}.weight": merged} | ({} if bias is None else {f"{path}.bias": shift[0]})


def _scaled(host: Any, name: str, state: State) -> State:
    """The layer that makes the feature, with what the tuners do to each entry of its output."""
    scale, shift = affine_of(host)
    weight, bias = (state[f"{name}.{part}"].double() for part in ("weight", "bias"))
    return {f"{name}.weight": weight * scale.unsqueeze(1), f"{name}.bias": bias * scale + shift}
