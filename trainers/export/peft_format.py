"""`peft`: what LoRA has learnt, or a tuner of the peft library, as an adapter folder of that library."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.models.tuners.peft_adapter import export_adapter
from tailtune.trainers.export import merged_format
from tailtune.trainers.export.exported_model import ExportedModel, save_head, save_state
from tailtune.trainers.export.library_network import clip_resolution, network, timm_name
from tailtune.trainers.export.loading_code import head_beside, how_to_load

CONVERTED = ("lora", "lora_mlp")
BASE = "base.safetensors"
"""The pre-trained weights, where nobody could get them by a name."""

Adapter = tuple[str, Tensor, Tensor, int]
"""Layer, A [r, in], B [out, r], alpha: the layer's output grows by (alpha / r)·B A x."""


def check(subject: ExportedModel) -> None:
    subject.refuse_experts("peft")
    others = [name for name in subject.tuners if name not in CONVERTED]
    if others:
        raise UserError(f"export peft: its format has no place for {', '.join(others)}; {_other_formats(subject)}")
    if not subject.tuners and not subject.peft:
        raise UserError("export peft: neither lora, lora_mlp nor peft is on, so there is no adapter; use export merged")
    if subject.tuners and subject.peft:
        raise UserError(f"export peft: one adapter folder cannot hold {subject.tuners[0]} and peft; use export merged")
    network(subject)


def _other_formats(subject: ExportedModel) -> str:
    """What holds the model instead, in words."""
    try:
        merged_format.check(subject)
    except UserError:
        return "`export onnx` has"
    return "`export merged` or `onnx` has"


@torch.no_grad()
def write(subject: ExportedModel, folder: Path) -> dict[str, Any]:
    about = network(subject)
    base, code = base_of(subject, about)
    if base == BASE:
        save_state(subject.encoder.pretrained_state(), folder / BASE)
    if subject.peft:
        export_adapter(subject.encoder, subject.peft, folder, base)
    else:
        _write_lora(list(_adapters(subject)), folder, base)
    save_head(subject, folder)
    code += "\nnet = peft.PeftModel.from_pretrained(net, '.')"
    return {"network": about, "base": base, "how_to_load": how_to_load(code, head_beside(subject))}


def base_of(subject: ExportedModel, about: Mapping[str, Any]) -> tuple[str, str]:
    """The pre-trained network below the adapter: its name, or `BASE` if it has to be written; code that makes it.

    Args:
        about: `network` of the subject.
    """
    found, net = subject.base, subject.encoder.net
    if found is not None and found.library == "timm":
        code = f"net = timm.create_model({found.name!r}, pretrained=True, num_classes=0)"
        native = timm.get_pretrained_cfg(found.name).input_size[-1]  # type: ignore[union-attr]
        resized = subject.resolution != native and hasattr(net, "set_input_size")
        return str(found), code + (f"\nnet.set_input_size({subject.resolution})" if resized else "")
    clip = f"open_clip.create_model({found.name!r}, pretrained={found.tag!r})" if found is not None else ""
    if clip and isinstance(subject.encoder, ViTEncoder) and timm_name(net) is None:
        state = f"timm.models.vision_transformer.checkpoint_filter_fn({clip}.state_dict(), net)"
        kept = f"{{name: each for name, each in {state}.items() if not name.startswith('head.')}}"
        return str(found), f"{about['code']}\nnet.load_state_dict({kept})"
    if clip and subject.resolution == clip_resolution(subject):
        if isinstance(subject.encoder, ViTEncoder):
            return str(found), f"{about['code']}\nnet.load_state_dict({clip}.visual.trunk.state_dict())"
        return str(found), f"net = {clip}{about['then']}"
    return BASE, f"{about['code']}\nnet.load_state_dict(load_file({BASE!r}))"


def _adapters(subject: ExportedModel) -> Iterator[Adapter]:
    """Query and value have one packed layer, so their two pairs of rank r are one of rank 2r, B block by block."""
    tuners = subject.encoder.tuners
    for index, sites in tuners["lora"].items() if "lora" in subject.tuners else ():
        q, v = sites["q"], sites["v"]
        b_q, b_v = q.lora_B.T, v.lora_B.T  # [D, r]
        zero = torch.zeros_like(b_q)
        a = torch.cat([q.lora_A.T, v.lora_A.T])
        b = torch.cat([torch.cat(row, dim=1) for row in ((b_q, zero), (zero, zero), (zero, b_v))])
        yield f"blocks.{index}.attn.qkv", a, b, 2
    for index, sites in tuners["lora_mlp"].items() if "lora_mlp" in subject.tuners else ():
        yield from ((f"blocks.{index}.mlp.{site}", each.lora_A.T, each.lora_B.T, 1) for site, each in sites.items())


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
    state = {f"{name}.lora_{part}.weight": each for name, a, b, _ in adapters for part, each in (("A", a), ("B", b))}
    save_state({f"base_model.model.{name}": each for name, each in state.items()}, folder / "adapter_model.safetensors")
