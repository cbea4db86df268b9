"""LIFT's and PEL's `checkpoint.pth.tar`: one table from its keys to our tensors serves both directions.

The file is {"tuner": …, "head": …}. Modules stand under `<list>.<block>.<name>`; weights of the network that train
stand under their position in the original's `named_parameters()`, whose order and names differ from timm's for CLIP.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.models import ClassificationModel
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.trainers.foreign_checkpoints.checkpoint_file import ForeignCheckpoint
from tailtune.trainers.foreign_checkpoints.class_numbering import ID, NAME, Numbering
from tailtune.trainers.storage.checkpoint import check_fit

LISTS: Mapping[str, tuple[str, Mapping[str, Sequence[str]]]] = {
    "vpt_shallow": ("vpt_list", {"": ["tokens"]}),
    "vpt_deep": ("vpt_list", {"": ["tokens"]}),
    "adapter": ("adapter_list", {"": ["mlp"]}),
    "adaptformer": ("adaptformer_list", {"": ["mlp"]}),
    "lora": ("lora_list", {"q.": ["q"], "v.": ["v"]}),
    "lora_mlp": ("lora_mlp_list", {"1.": ["fc1"], "2.": ["fc2"]}),
    "ssf_attn": ("ssf_attn_list", {"attn_in.": ["q", "k", "v"], "attn_out.": ["proj"]}),
    "ssf_mlp": ("ssf_mlp_list", {"mlp_in.": ["fc1"], "mlp_out.": ["fc2"]}),
    "ssf_ln": ("ssf_ln_list", {"ln_1.": ["norm1"], "ln_2.": ["norm2"]}),
}
"""Tuner → the original's list, and its modules → our sites; of several, the tensors stand one behind the other."""

MASKED = {"qkv": "attn_in", "proj": "attn_out", "fc1": "mlp_in", "fc2": "mlp_out"}

OF_CLIP = {
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj.weight": "attn.proj.weight",
    "attn.out_proj.bias": "attn.proj.bias",
    "ln_1.weight": "norm1.weight",
    "ln_1.bias": "norm1.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
    "ln_2.weight": "norm2.weight",
    "ln_2.bias": "norm2.bias",
}
"""Parameters of a block of OpenAI's CLIP, in its order → timm's names."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of the file lives in a model: in one or several tensors, or at some entries of one."""

    tensors: Sequence[Tensor]
    entries: Tensor | None = None

    def read(self) -> Tensor:
        first = self.tensors[0].detach()
        if self.entries is not None:
            return first[self.entries]
        return first if len(self.tensors) == 1 else torch.cat([each.detach() for each in self.tensors])

    def write(self, value: Tensor) -> None:
        if self.entries is not None:
            self.tensors[0].detach()[self.entries] = value.to(self.tensors[0])
            return
        parts = [value] if len(self.tensors) == 1 else value.split([len(each) for each in self.tensors])
        for target, part in zip(self.tensors, parts, strict=True):
            target.detach().copy_(part)


Named = Iterator[tuple[str, Place]]


def layout(model: ClassificationModel, tuners: Sequence[str], partial: Any = None) -> dict[str, Place]:
    """The original's keys, `tuner.…` and `head.…`, and where their tensors are in a model.

    Args:
        tuners: names of the tuners that are on.
        partial: the option.

    Raises:
        UserError: the original has no such backbone or tuner.
    """
    host = model.encoder
    named = _vit(host, tuners, partial) if isinstance(host, ViTEncoder) else _resnet(host, tuners)
    found = {f"tuner.{name}": place for name, place in named}
    return found | {f"head.{name}": Place([each]) for name, each in model.head.state_dict(keep_vars=True).items()}


def _vit(host: ViTEncoder, tuners: Sequence[str], partial: Any) -> Named:
    blocks, modules = host.net.blocks, dict[str, Any](host.tuners.items())
    of_timm = {name: name for name, _ in blocks[0].named_parameters()}
    names = OF_CLIP if isinstance(host.net.norm_pre, nn.LayerNorm) else of_timm
    for tuner in tuners:
        if tuner == "full_tuning":
            for index in host.block_range(partial):
                yield from (
                    (f"block_tuned.{index}.{name}", Place([blocks[index].get_parameter(own)]))
                    for name, own in names.items()
                )
        elif tuner == "bias_tuning":  # of all blocks, whatever `partial` says
            biases = (block.get_parameter(own) for block in blocks for own in names.values() if own.endswith("bias"))
            yield from ((f"bias_tuned.{k}", Place([each])) for k, each in enumerate(biases))
        elif tuner == "ln_tuning":  # of all blocks too
            norms = (norm for block in blocks for norm in (block.norm1, block.norm2))
            yield from _listed("ln_tuned", norms)
        elif tuner == "mask":
            yield from _masks(host, modules[tuner].items())
        elif tuner in LISTS:
            yield from _modules(modules[tuner].items(), *LISTS[tuner])
        else:
            raise UserError(f"LIFT has no {tuner} on a ViT")


def _modules(blocks: Any, listed: str, places: Mapping[str, Sequence[str]]) -> Named:
    """What a tuner has inserted; `blocks` are pairs of a block's index and its site → module."""
    for index, sites in blocks:
        for place, own in places.items():
            states = [sites[site].state_dict(keep_vars=True) for site in own]
            yield from ((f"{listed}.{index}.{place}{name}", Place([s[name] for s in states])) for name in states[0])


def _masks(host: ViTEncoder, blocks: Any) -> Named:
    """Values in the order of their positions, weight and bias apart: row by row, as in the original."""
    for index, masks in blocks:
        for layer, place in MASKED.items():
            width: Any = host.layers(int(index))[layer].in_features
            is_bias = masks[layer].positions % (width + 1) == width
            for name, chosen in (("weight", ~is_bias), ("bias", is_bias)):
                yield f"masked_linear_list.{index}.{place}.optimized_{name}", Place([masks[layer].values], chosen)


def _resnet(host: Any, tuners: Sequence[str]) -> Named:
    if not isinstance(host.net, ModifiedResNet):
        raise UserError("LIFT has ViTs and CLIP's ResNets only, so no checkpoint of its kind fits this backbone")
    named = list(host.net.named_parameters())
    for tuner in tuners:
        if tuner == "full_tuning":
            yield from ((f"full_list.{k}", Place([each])) for k, (_, each) in enumerate(named))
        elif tuner == "bias_tuning":
            biases = (each for name, each in named if name.endswith("bias"))
            yield from ((f"bias_list.{k}", Place([each])) for k, each in enumerate(biases))
        elif tuner == "bn_tuning":
            yield from _listed("bn_list", (each for each in host.net.modules() if isinstance(each, nn.BatchNorm2d)))
        elif tuner == "ssf_attn":
            state = host.tuners[tuner].state_dict(keep_vars=True)
            yield from ((f"ssf_attn.{name}", Place([each])) for name, each in state.items())
        else:
            raise UserError(f"LIFT has no {tuner} on a ResNet")


def _listed(name: str, modules: Iterator[nn.Module]) -> Named:
    for k, module in enumerate(modules):
        yield from ((f"{name}.{k}.{key}", Place([each])) for key, each in module.state_dict(keep_vars=True).items())


def load(
    file: ForeignCheckpoint,
    model: ClassificationModel,
    tuners: Sequence[str],
    partial: Any = None,
    numbering: Numbering | None = None,
) -> str:
    """Fill a model from a file of LIFT or PEL, strictly; returns a report in words.

    Args:
        numbering: of iNaturalist's classes in the data; the file ranks their names, those of taxa for a taxon.

    Raises:
        UserError: everything that is missing, unexpected or of another shape, by name.
    """
    tensors, places = file.tensors, layout(model, tuners, partial)
    lists = Counter(name.split(".")[1] for name in tensors if name.startswith("tuner."))
    held = ", ".join(f"{name} ({count})" for name, count in lists.items()) or "nothing"
    own = {name: place.read() for name, place in places.items()}
    check_fit(own, tensors, str(file.path), f"give the options that fit it: its tuner holds {held}")
    theirs = NAME if numbering is None or numbering.field == ID else numbering.field
    order = numbering.order(theirs) if numbering else None
    for name, place in places.items():
        place.write(tensors[name] if order is None or not name.startswith("head.") else tensors[name][order])
    model.set_precision()  # anew, because it derives from weights that may have changed
    heads = sum(name.startswith("head.") for name in tensors)
    report = f"read {file.path}: {len(tensors)} tensors, of the tuner {held}, of the head {heads}; none is left out"
    if "mask" in tuners:
        report += "; the positions of the mask are drawn from mask_seed, because the file has none"
    if {"lora", "ssf_attn"} <= set(tuners):
        report += "; lora acts before ssf_attn, as in LIFT (PEL: after it)"
    return f"{report}; {numbering.said(theirs)}" if numbering and order is not None else report
