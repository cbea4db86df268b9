"""Maps the keys of `checkpoint.pth.tar` of LIFT and PEL to TailTune's tensors, for loading and exporting.

The file is {"tuner": …, "head": …}. The keys of inserted modules are `<list>.<block>.<name>`. The keys of the network's
own weights are positions in LIFT's `named_parameters()`. For CLIP, the order and the names there differ from timm's.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.configs.lazy_module import lazy_module
from tailtune.models import ClassificationModel
from tailtune.models.backbones.plain_vit import timm_name
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.trainers.foreign_checkpoints.checkpoint_file import ForeignCheckpoint
from tailtune.trainers.foreign_checkpoints.class_numbering import ID, NAME, Numbering
from tailtune.trainers.storage.checkpoint import check_fit

open_clip = lazy_module("open_clip")

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
"""Tuner → name of LIFT's list of modules, and a mapping from LIFT's modules to TailTune's sites. A module of LIFT may
contain the concatenated tensors of several sites."""

LIFT_MASKS = {"qkv": "attn_in", "proj": "attn_out", "fc1": "mlp_in", "fc2": "mlp_out"}
"""Linear layer of a block → name of its mask in LIFT."""

CLIP_TO_TIMM = {
    f"{layer}{kind}": timm_name(f"{layer}{kind}")
    for layer in ("attn.in_proj_", "attn.out_proj.", "ln_1.", "mlp.c_fc.", "mlp.c_proj.", "ln_2.")
    for kind in ("weight", "bias")
}
"""Name of a parameter in a block of OpenAI's CLIP → timm's name. The order is that of OpenAI's CLIP."""


@dataclass(frozen=True)
class Target:
    """The tensors of a model that correspond to one tensor of the file.

    Args:
        tensors: one tensor, or several tensors whose concatenation is in the file.
        entries: boolean mask of the entries of a single tensor that are in the file; None: all entries.
    """

    tensors: Sequence[Tensor]
    entries: Tensor | None = None

    def read(self) -> Tensor:
        """The value of the tensor in the file."""
        first = self.tensors[0].detach()
        if self.entries is not None:
            return first[self.entries]
        return first if len(self.tensors) == 1 else torch.cat([tensor.detach() for tensor in self.tensors])

    def write(self, value: Tensor) -> None:
        """Copy the value from the file into the model."""
        if self.entries is not None:
            self.tensors[0].detach()[self.entries] = value.to(self.tensors[0])
            return
        pieces = [value] if len(self.tensors) == 1 else value.split([len(tensor) for tensor in self.tensors])
        for tensor, piece in zip(self.tensors, pieces, strict=True):
            tensor.detach().copy_(piece)


NamedTargets = Iterator[tuple[str, Target]]
"""Pairs of a key of LIFT and the tensors that correspond to it."""


def layout(model: ClassificationModel, tuners: Sequence[str]) -> dict[str, Target]:
    """Map LIFT's keys to the corresponding tensors of a model.

    Args:
        model: the model.
        tuners: names of the tuners of TUNERS that are enabled.

    Returns:
        Key (`tuner.…` or `head.…`) → tensors.

    Raises:
        UserError: LIFT does not have this backbone or tuner.
    """
    encoder = model.encoder
    named = _vit(encoder, tuners) if isinstance(encoder, ViTEncoder) else _resnet(encoder, tuners)
    of_tuners = {f"tuner.{name}": target for name, target in named}
    head = model.head.state_dict(keep_vars=True)
    return of_tuners | {f"head.{name}": Target([tensor]) for name, tensor in head.items()}


def _vit(encoder: ViTEncoder, tuners: Sequence[str]) -> NamedTargets:
    """The keys of tuners on a ViT."""
    blocks, modules = encoder.net.blocks, dict[str, Any](encoder.tuners.items())
    timm_names = {name: name for name, _ in blocks[0].named_parameters()}
    names = CLIP_TO_TIMM if isinstance(encoder.net.norm_pre, nn.LayerNorm) else timm_names
    for tuner in tuners:
        if tuner == "full_tuning":
            for index in encoder.tuned_blocks[tuner]:
                yield from (
                    (f"block_tuned.{index}.{name}", Target([blocks[index].get_parameter(timm_name)]))
                    for name, timm_name in names.items()
                )
        elif tuner == "bias_tuning":  # in LIFT it applies to all blocks and ignores `partial`
            bias_names = [name for name in names.values() if name.endswith("bias")]
            biases = (block.get_parameter(name) for block in blocks for name in bias_names)
            yield from ((f"bias_tuned.{index}", Target([bias])) for index, bias in enumerate(biases))
        elif tuner == "ln_tuning":  # likewise for all blocks
            norms = (norm for block in blocks for norm in (block.norm1, block.norm2))
            yield from _listed("ln_tuned", norms)
        elif tuner == "mask":
            yield from _masks(encoder, modules[tuner].items())
        elif tuner in LISTS:
            yield from _modules(modules[tuner].items(), *LISTS[tuner])
        else:
            raise UserError(f"LIFT has no {tuner} on a ViT")


def _modules(blocks: Any, list_name: str, sites_of: Mapping[str, Sequence[str]]) -> NamedTargets:
    """The keys of modules that a tuner has inserted.

    Args:
        blocks: pairs of the index of a block and a mapping site → module.
        list_name: name of LIFT's list of modules.
        sites_of: name of LIFT's module → TailTune's sites.
    """
    for index, modules in blocks:
        for lift_module, sites in sites_of.items():
            states = [modules[site].state_dict(keep_vars=True) for site in sites]
            for name in states[0]:
                yield f"{list_name}.{index}.{lift_module}{name}", Target([state[name] for state in states])


def _masks(encoder: ViTEncoder, blocks: Any) -> NamedTargets:
    """The keys of masks. As in LIFT, weights and biases are separate, and values are ordered by position."""
    for index, masks in blocks:
        for layer, lift_name in LIFT_MASKS.items():
            width: Any = encoder.layers(int(index))[layer].in_features
            is_bias = masks[layer].positions % (width + 1) == width
            for name, chosen in (("weight", ~is_bias), ("bias", is_bias)):
                yield f"masked_linear_list.{index}.{lift_name}.optimized_{name}", Target([masks[layer].values], chosen)


def _resnet(encoder: Any, tuners: Sequence[str]) -> NamedTargets:
    """The keys of tuners on a CLIP ResNet."""
    if not isinstance(encoder.net, open_clip.modified_resnet.ModifiedResNet):
        raise UserError("LIFT has ViTs and CLIP's ResNets only, so no checkpoint of its kind fits this backbone")
    named = list(encoder.net.named_parameters())
    for tuner in tuners:
        if tuner == "full_tuning":
            yield from ((f"full_list.{index}", Target([weight])) for index, (_, weight) in enumerate(named))
        elif tuner == "bias_tuning":
            biases = (parameter for name, parameter in named if name.endswith("bias"))
            yield from ((f"bias_list.{index}", Target([bias])) for index, bias in enumerate(biases))
        elif tuner == "bn_tuning":
            yield from _listed("bn_list", (norm for norm in encoder.net.modules() if isinstance(norm, nn.BatchNorm2d)))
        elif tuner == "ssf_attn":
            state = encoder.tuners[tuner].state_dict(keep_vars=True)
            yield from ((f"ssf_attn.{name}", Target([tensor])) for name, tensor in state.items())
        else:
            raise UserError(f"LIFT has no {tuner} on a ResNet")


def _listed(name: str, modules: Iterator[nn.Module]) -> NamedTargets:
    """The keys of a list of the network's own modules."""
    for index, module in enumerate(modules):
        for key, tensor in module.state_dict(keep_vars=True).items():
            yield f"{name}.{index}.{key}", Target([tensor])


def load(
    file: ForeignCheckpoint,
    model: ClassificationModel,
    tuners: Sequence[str],
    numbering: Numbering | None = None,
) -> str:
    """Load a file of LIFT or PEL into a model. Every tensor must have the right name and shape.

    Args:
        file: the file.
        model: the model to fill.
        tuners: names of the tuners of TUNERS that are enabled.
        numbering: class numbering of iNaturalist in the data. LIFT and PEL number the species, or taxa, in the order
            of their names.

    Returns:
        A report in words.

    Raises:
        UserError: names the tensors that are missing, unexpected or of another shape.
    """
    lists = Counter(name.split(".")[1] for name in file.tensors if name.startswith("tuner."))
    tuner_lists = ", ".join(f"{name} ({count})" for name, count in lists.items()) or "nothing"
    report = fill(file, model, layout(model, tuners), "head.", tuner_lists, numbering)
    if "mask" in tuners:
        report += "; the positions of the mask are drawn from mask_seed, because the file has none"
    if {"lora", "ssf_attn"} <= set(tuners):
        report += "; lora acts before ssf_attn, as in LIFT (PEL: after it)"
    return report


def fill(
    file: ForeignCheckpoint,
    model: ClassificationModel,
    targets: Mapping[str, Target],
    head: str,
    holds: str,
    numbering: Numbering | None,
) -> str:
    """Copy the tensors of a file into a model. Nothing is copied unless all of them fit.

    Args:
        file: the file.
        model: the model to fill.
        targets: key of the file → tensors of the model.
        head: prefix of the keys of the head, whose rows are classes.
        holds: what the tuner of the file holds, in words.
        numbering: class numbering of iNaturalist in the data. The file numbers the species, or taxa, in the order of
            their names.

    Returns:
        A report in words.

    Raises:
        UserError: names the tensors that are missing, unexpected or of another shape.
    """
    tensors = file.tensors
    current = {name: target.read() for name, target in targets.items()}
    check_fit(current, tensors, str(file.path), f"give the options that fit it: its tuner holds {holds}")
    theirs = NAME if numbering is None or numbering.field == ID else numbering.field
    order = numbering.order(theirs) if numbering else None
    for name, target in targets.items():
        target.write(tensors[name] if order is None or not name.startswith(head) else tensors[name][order])
    model.set_precision()  # again, because some of its tensors are computed from the weights
    heads = sum(name.startswith(head) for name in tensors)
    report = f"read {file.path}: {len(tensors)} tensors"
    report += f", of the tuner {holds}, of the head {heads}; none is left out"
    return f"{report}; {numbering.report(theirs)}" if numbering and order is not None else report
