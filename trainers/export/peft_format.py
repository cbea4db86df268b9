"""Export format `peft`: an adapter folder of the peft library, with TailTune's LoRA or a tuner of that library."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.configs.lazy_module import lazy_module
from tailtune.models.backbones.pretrained_weights import hub_or_cache
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.models.tuners.peft_adapter import export_adapter
from tailtune.trainers.export import merged_format
from tailtune.trainers.export.exported_model import ExportedModel, save_head, save_state
from tailtune.trainers.export.library_network import clip_resolution, network, timm_name
from tailtune.trainers.export.loading_code import how_to_load, separate_head
from tailtune.trainers.storage.atomic_io import write_json

open_clip = lazy_module("open_clip")
timm = lazy_module("timm")
CONVERTED = ("lora", "lora_mlp")
"""TailTune's own tuners that the format of peft can hold."""
log = logging.getLogger("tailtune")
BASE = "base.safetensors"
"""File for the pre-trained weights if they are not published under a name."""

Adapter = tuple[str, Tensor, Tensor, int]
"""Name of a layer, A [r, in], B [out, r] and alpha. The adapter adds (alpha / r) · B A x to the layer's output."""


def check(exported: ExportedModel) -> None:
    """Raise a `UserError` if the model is not one network with one adapter and one head."""
    exported.refuse_experts("peft")
    others = [name for name in exported.tuners if name not in CONVERTED]
    if others:
        formats = "`export merged` or `onnx` has" if merged_format.can_hold(exported) else "`export onnx` has"
        raise UserError(f"export peft: its format has no place for {', '.join(others)}; {formats}")
    if not exported.tuners and not exported.peft:
        raise UserError("export peft: neither lora, lora_mlp nor peft is on, so there is no adapter; use export merged")
    if exported.tuners and exported.peft:
        raise UserError(f"export peft: one adapter folder cannot hold {exported.tuners[0]} and peft; use export merged")
    network(exported)


@torch.no_grad()
def write(exported: ExportedModel, folder: Path) -> dict[str, Any]:
    """Write the adapter, the head, and the pre-trained weights if they are not published under a name.

    Args:
        exported: the model.
        folder: the folder to write into.

    Returns:
        Facts for `facts.json`.
    """
    about = network(exported)
    base, code = base_of(exported, about)
    if base != BASE and not _is_base(exported, base):
        base, code = base_in_file(about)
    if base == BASE:
        save_state(exported.encoder.pretrained_state(), folder / BASE)
    if exported.peft:
        export_adapter(exported.encoder, exported.peft, folder, base)
    else:
        _write_lora(list(_adapters(exported)), folder, base)
    save_head(exported, folder)
    config = folder / "adapter_config.json"
    # peft notes the class of the network, which may be one of TailTune. Nobody else can import it.
    write_json(config, {**json.loads(config.read_text(encoding="utf-8")), "auto_mapping": None})
    load = how_to_load(f"{code}\nnet = peft.PeftModel.from_pretrained(net, '.')", separate_head(exported))
    # The network is useless without its pre-trained weights, so its code loads them, too.
    return {"network": {**about, "code": code}, "base": base, "how_to_load": load}


def base_of(exported: ExportedModel, about: Mapping[str, Any]) -> tuple[str, str]:
    """The pre-trained network to which the adapter is added.

    Args:
        exported: the model.
        about: return value of `network`.

    Returns:
        Published name of the network, or `BASE` if its weights have to be written to a file; and code that creates it.
    """
    published, net = exported.base, exported.encoder.net
    if published is not None and published.library == "timm":
        code = f"net = timm.create_model({published.name!r}, pretrained=True, num_classes=0)"
        native = timm.get_pretrained_cfg(published.name).input_size[-1]
        resized = exported.resolution != native and hasattr(net, "set_input_size")
        return str(published), code + (f"\nnet.set_input_size({exported.resolution})" if resized else "")
    clip = f"open_clip.create_model({published.name!r}, pretrained={published.tag!r})" if published is not None else ""
    if clip and isinstance(exported.encoder, ViTEncoder) and timm_name(net) is None:
        state = f"timm.models.vision_transformer.checkpoint_filter_fn({clip}.state_dict(), net)"
        kept = f"{{name: tensor for name, tensor in {state}.items() if not name.startswith('head.')}}"
        return str(published), f"{about['code']}\nnet.load_state_dict({kept})"
    if clip and exported.resolution == clip_resolution(exported):
        if isinstance(exported.encoder, ViTEncoder):
            return str(published), f"{about['code']}\nnet.load_state_dict({clip}.visual.trunk.state_dict())"
        return str(published), f"net = {clip}{about['then']}"
    return base_in_file(about)


def base_in_file(about: Mapping[str, Any]) -> tuple[str, str]:
    """As `base_of`, for weights that are written to a file."""
    return BASE, f"{about['code']}\nnet.load_state_dict(load_file({BASE!r}))"


def _is_base(exported: ExportedModel, base: str) -> bool:
    """Whether a published network has the weights that the adapter was trained on.

    False if they cannot be loaded by the library's own code, so that the weights are written to a file.

    Args:
        exported: the model.
        base: name of the network, as `base_of` returns it.
    """
    try:
        with hub_or_cache():
            published = _published_state(exported)
    except (OSError, RuntimeError):  # not in the library's cache, and not downloadable
        log.info("export peft: %s is not at hand, so its weights are written to %s", base, BASE)
        return False
    own = exported.encoder.pretrained_state()
    return own.keys() == published.keys() and all(
        own[name].shape == tensor.shape and torch.allclose(own[name].float(), tensor.float(), atol=1e-5)
        for name, tensor in published.items()
    )


def _published_state(exported: ExportedModel) -> dict[str, Tensor]:
    """The tensors of the network that the code of `base_of` creates."""
    published, net = exported.base, exported.encoder.net
    assert published is not None
    if published.library == "timm":
        made = timm.create_model(published.name, pretrained=True, num_classes=0)
        native = timm.get_pretrained_cfg(published.name).input_size[-1]
        if exported.resolution != native and hasattr(made, "set_input_size"):
            made.set_input_size(exported.resolution)
        return made.state_dict()
    clip = open_clip.create_model(published.name, pretrained=published.tag)
    if not isinstance(exported.encoder, ViTEncoder):
        return clip.visual.state_dict()
    if timm_name(net) is not None:
        return clip.visual.trunk.state_dict()
    state = timm.models.vision_transformer.checkpoint_filter_fn(clip.state_dict(), net)
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


def _adapters(exported: ExportedModel) -> Iterator[Adapter]:
    """TailTune's LoRA layers in the form of peft.

    Query and value are parts of one packed layer. Their two updates of rank r become one update of rank 2r, whose
    matrix B consists of blocks.
    """
    tuners = exported.encoder.tuners
    for index, sites in tuners["lora"].items() if "lora" in exported.tuners else ():
        q, v = sites["q"], sites["v"]
        b_q, b_v = q.lora_B.T, v.lora_B.T  # [D, r]
        zero = torch.zeros_like(b_q)
        a = torch.cat([q.lora_A.T, v.lora_A.T])
        b = torch.cat([torch.cat(row, dim=1) for row in ((b_q, zero), (zero, zero), (zero, b_v))])
        yield f"blocks.{index}.attn.qkv", a, b, 2
    for index, sites in tuners["lora_mlp"].items() if "lora_mlp" in exported.tuners else ():
        yield from ((f"blocks.{index}.mlp.{site}", lora.lora_A.T, lora.lora_B.T, 1) for site, lora in sites.items())


def _write_lora(adapters: list[Adapter], folder: Path, base: str) -> None:
    from peft import LoraConfig

    ranks = {name: a.shape[0] for name, a, _, _ in adapters}
    config = LoraConfig(
        base_model_name_or_path=base,
        r=max(ranks.values()),
        lora_alpha=max(alpha for *_, alpha in adapters),
        target_modules=list(ranks),
        rank_pattern=ranks,
        alpha_pattern={name: alpha for name, _, _, alpha in adapters},
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    state = {
        f"base_model.model.{name}.lora_{letter}.weight": matrix
        for name, a, b, _ in adapters
        for letter, matrix in (("A", a), ("B", b))
    }
    save_state(state, folder / "adapter_model.safetensors")
