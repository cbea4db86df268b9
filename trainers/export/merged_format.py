"""Export format `merged`: weights of a plain timm or open_clip network, with affine tuners merged into them."""

import copy
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tailtune.configs.errors import UserError
from tailtune.configs.lazy_module import lazy_module
from tailtune.models.backbones.transformer_encoder import LAYERS, SITES, Sites
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.models.backbones.vit_layers import apply_tuners
from tailtune.models.tuners.peft_adapter import merge_adapter
from tailtune.trainers.export.exported_model import ExportedModel, affine_of, linear_head, save_head, save_state
from tailtune.trainers.export.library_network import classifier_name, network
from tailtune.trainers.export.loading_code import APPLY_WITHIN, HEAD_WITHIN, how_to_load, separate_head

open_clip = lazy_module("open_clip")

NORM_BEFORE = {"qkv": "norm1", "fc1": "norm2"}
"""Linear layer of a block → the site of the normalisation layer before it."""
State = dict[str, Tensor]


def check(exported: ExportedModel) -> None:
    """Raise a `UserError` if the tuners of the model cannot be merged into the weights of a plain network."""
    exported.refuse_experts("merged")
    encoder = exported.encoder
    unmergeable = set(SITES) - {*NORM_BEFORE.values(), *LAYERS, *("q", "k", "v")}
    lost = [
        tuner
        for tuner, blocks in _inserted(encoder).items()
        if any(site in unmergeable for sites in blocks.values() for site in sites)
    ]
    if isinstance(encoder, ViTEncoder) and not lost and any(sites["tokens"] for sites in encoder.sites[0]):
        lost = ["the prompts of context maple"]  # they are a part of the text tower
    if lost:
        raise UserError(f"export merged: a plain network has no place for {', '.join(lost)}; `export onnx` keeps it")
    network(exported)


def can_hold(exported: ExportedModel) -> bool:
    """Whether `check` accepts the model."""
    try:
        check(exported)
    except UserError:
        return False
    return True


def _inserted(encoder: Any) -> dict[str, Any]:
    """Tuner → block → site → module."""
    return dict(encoder.tuners.items()) if isinstance(encoder, ViTEncoder) else {}


@torch.no_grad()
def write(exported: ExportedModel, folder: Path) -> dict[str, Any]:
    """Write the merged weights. A head that is not linear is written to a separate file.

    Args:
        exported: the model.
        folder: the folder to write into.

    Returns:
        Facts for `facts.json`.
    """
    linear, place = linear_head(exported.head), classifier_name(exported)
    about = network(exported, len(exported.class_names) if linear and place else 0)
    state = {about["prefix"] + name: tensor for name, tensor in merged(exported).items()}
    weights = "load_file('model.safetensors')"
    if about["prefix"]:
        weights = f"{{name.removeprefix('{about['prefix']}'): tensor for name, tensor in {weights}.items()}}"
    code = f"{about['code']}\nnet.load_state_dict({weights})"
    if linear and place:
        state |= {f"{place}.{name}": tensor for name, tensor in linear.items()}
        head, facts = HEAD_WITHIN, {"head": {"type": type(exported.head).__name__, "apply": APPLY_WITHIN}}
    else:
        save_head(exported, folder)
        head, facts = separate_head(exported), {}
    save_state(state, folder / "model.safetensors")
    return {"network": about, **facts, "how_to_load": how_to_load(code, head)}


def merged(exported: ExportedModel) -> State:
    """State dict of the plain network with all tuners merged into it. TailTune's own tuners are merged in fp64."""
    encoder, peft = exported.encoder, exported.peft
    state = dict(merge_adapter(encoder, peft) if peft else encoder.pretrained_state())
    if isinstance(encoder, ViTEncoder):
        layers = [*product(range(encoder.depth), LAYERS.items())]
        bar = tqdm(layers, desc="merging", unit="layer", delay=2, leave=False, disable=None)
        for index, (name, path) in bar:
            state |= _merged_layer(encoder.sites[0][index], name, f"blocks.{index}.{path}", state)
    elif isinstance(encoder.net, open_clip.modified_resnet.ModifiedResNet) and len(encoder.tuners):
        state |= _scaled_feature(encoder, "attnpool.c_proj", state)
    return state


def _merged_layer(sites: Sites, name: str, path: str, state: State) -> State:
    """Merge the tuners around a linear layer into its weight and bias.

    The layer and its tuners together are an affine function. Its values at zero and at the unit vectors determine it.

    Args:
        sites: tuners of the block.
        name: name of the layer in LAYERS.
        path: name of the layer in the state dict.
        state: state dict of the plain network.

    Returns:
        Name in the state dict → merged tensor; empty if there are no tuners.
    """
    outputs = ("q", "k", "v") if name == "qkv" else (name,)
    norm, weights = NORM_BEFORE.get(name, "none"), f"{name}.weights"
    tuners = {
        site: [copy.deepcopy(module).double() for module in sites.get(site, [])] for site in (norm, weights, *outputs)
    }
    if not any(tuners.values()):
        return {}
    weight, bias = state[f"{path}.weight"].double(), state.get(f"{path}.bias")
    weight, bias = apply_tuners(tuners[weights], (weight, None if bias is None else bias.double()), weight)

    def affine(x: Tensor) -> Tensor:
        x = apply_tuners(tuners[norm], x, x)
        chunks = F.linear(x, weight, bias).chunk(len(outputs), dim=-1)
        return torch.cat([apply_tuners(tuners[site], y, x) for site, y in zip(outputs, chunks, strict=True)], dim=-1)

    shift = affine(weight.new_zeros(1, weight.shape[1]))
    merged = (affine(torch.eye(weight.shape[1], dtype=weight.dtype)) - shift).T
    probe = torch.randn(4, weight.shape[1], dtype=weight.dtype, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(affine(probe), F.linear(probe, merged, shift[0])), f"a tuner at {path} is not affine"
    if bias is None and shift.any():
        raise UserError(f"export merged: {path} has no bias that could take a tuner's shift; `export onnx` keeps it")
    return {f"{path}.weight": merged} | ({} if bias is None else {f"{path}.bias": shift[0]})


def _scaled_feature(encoder: Any, name: str, state: State) -> State:
    """Merge the tuners on the feature into the weight and bias of the layer whose output is the feature."""
    scale, shift = affine_of(encoder)
    weight, bias = (state[f"{name}.{suffix}"].double() for suffix in ("weight", "bias"))
    return {f"{name}.weight": weight * scale.unsqueeze(1), f"{name}.bias": bias * scale + shift}
