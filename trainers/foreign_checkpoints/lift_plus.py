"""Maps the keys of `checkpoint.pth.tar` of LIFT+ to TailTune's tensors, for loading and exporting.

The file is {"tuner": …}, and the head is in it as `classifier.…`. Modules in a block are
`image_encoder.blocks.<block>.<name>`; the network's own weights have their path there, with `_` for every dot. Without
a head, text features classify: `text_encoder.…` has the same names, and what trains behind both encoders has its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.models import ClassificationModel
from tailtune.models.backbones.text_tower import TextTower
from tailtune.models.backbones.transformer_encoder import TransformerEncoder
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.models.backbones.whole_network_encoder import RESNET_STAGES, WholeNetworkEncoder
from tailtune.models.feature_adapters import ResidualAdapter
from tailtune.models.heads.expert_heads import heads_of
from tailtune.models.heads.text_classifier import TextClassifier
from tailtune.models.text_contexts import Vectors
from tailtune.trainers.foreign_checkpoints.checkpoint_file import ForeignCheckpoint
from tailtune.trainers.foreign_checkpoints.checkpoint_tensors import LIFT_PLUS_NAMES
from tailtune.trainers.foreign_checkpoints.class_numbering import Numbering
from tailtune.trainers.foreign_checkpoints.lift import NamedTargets, Target, fill

HEAD = "tuner.classifier."
"""Prefix of the names of the head's tensors."""
BLOCKS, TEXT_BLOCKS = "image_encoder.blocks", "text_encoder.blocks"
PATHS = {"qkv": "attn.in_proj", "proj": "attn.out_proj", "fc1": "mlp.in_proj", "fc2": "mlp.out_proj"}
"""Linear layer of a block → its path in LIFT+."""
OWN = {"attn.qkv": "attn.in_proj", "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.in_proj", "mlp.fc2": "mlp.out_proj"}
"""Path of a linear layer in a block → its path in LIFT+."""
WORDS = ("prompt", "lora", "adapter", "adaptformer", "ssf", "aft", "text_encoder", "ctx", "image_proj", "image_adapter")
"""Parts of the names of what a tuner of LIFT+ may hold."""
ADAPTER = {"norm": "ln", "down": "down_proj", "up": "up_proj"}
"""Layer of an adapter of LIFT+ → ours."""


@dataclass(frozen=True)
class MaskTarget(Target):
    """Which values of a weight or bias train: positions here, and in the file a boolean mask of the tensor's shape.

    Args:
        tensors: the positions of a `TensorMasks`.
        entries: which of them are in this weight or bias.
        shape: shape of the weight or bias.
        start: position of its first value.
    """

    shape: torch.Size = torch.Size()
    start: int = 0

    def read(self) -> Tensor:
        mask = torch.zeros(self.shape.numel(), dtype=torch.bool, device=self.tensors[0].device)
        if not mask.is_meta:
            mask[self.tensors[0][self.entries].long() - self.start] = True
        return mask.view(self.shape)

    def write(self, value: Tensor) -> None:
        self.tensors[0][self.entries] = (value.flatten().nonzero()[:, 0] + self.start).to(self.tensors[0])

    def refuse(self, value: Tensor, name: str) -> None:
        """Raise a `UserError` if a mask of a file does not have as many values as the positions."""
        count = int(torch.as_tensor(self.entries).sum())
        if int(value.sum()) != count:
            raise UserError(
                f"{name} trains {int(value.sum())} values and this run {count}: give the aft_ratio of the file"
            )


class TransposedTarget(Target):
    """A weight that is transposed in the file."""

    def read(self) -> Tensor:
        return super().read().T

    def write(self, value: Tensor) -> None:
        super().write(value.T)


def is_lift_plus(file: ForeignCheckpoint) -> bool:
    """Whether a file is a checkpoint of LIFT+."""
    return any(name.removeprefix("tuner.").startswith(LIFT_PLUS_NAMES) for name in file.tensors)


def layout(model: ClassificationModel, tuners: Sequence[str]) -> dict[str, Target]:
    """Map LIFT+'s keys to the corresponding tensors of a model.

    Args:
        model: the model.
        tuners: names of the tuners of TUNERS that are enabled.

    Returns:
        Key (`tuner.…`) → tensors.

    Raises:
        UserError: LIFT+ does not have this backbone or tuner.
    """
    encoder = model.encoder
    named = _transformer(encoder, tuners, BLOCKS) if isinstance(encoder, ViTEncoder) else _resnet(encoder, tuners)
    if model.text is not None:
        named = chain(named, _text(model, model.text))
    else:
        head = model.head.state_dict(keep_vars=True)
        named = chain(named, ((f"classifier.{name}", Target([tensor])) for name, tensor in head.items()))
    return {f"tuner.{name}": target for name, target in named}


def load(
    file: ForeignCheckpoint, model: ClassificationModel, tuners: Sequence[str], numbering: Numbering | None = None
) -> str:
    """Load a file of LIFT+ into a model. Every tensor must have the right name and shape.

    Args:
        file: the file.
        model: the model to fill.
        tuners: names of the tuners of TUNERS that are enabled.
        numbering: class numbering of iNaturalist in the data. LIFT+ numbers the species in the order of their names.

    Returns:
        A report in words.

    Raises:
        UserError: names the tensors that are missing, unexpected or of another shape.
    """
    targets = layout(model, tuners)
    for name, target in targets.items():
        if isinstance(target, MaskTarget) and name in file.tensors:
            target.refuse(file.tensors[name], f"{file.path}: {name}")
    words = {word for name in file.tensors for word in name.split(".")}
    holds = ", ".join(word for word in WORDS if word in words) or "no module"
    return fill(file, model, targets, HEAD, holds, numbering)


def _transformer(encoder: TransformerEncoder, tuners: Sequence[str], blocks: str) -> NamedTargets:
    """The keys of tuners on a ViT or a text tower, whose blocks have the names `<blocks>.<number>`."""
    _check_scales(encoder, tuners)
    modules = dict[str, Any](encoder.tuners.items())
    for tuner in tuners:
        if tuner in ("full_tuning", "bias_tuning"):
            for index in encoder.tuned_blocks[tuner]:
                for name, weight in encoder.net.blocks[index].named_parameters():
                    if tuner == "full_tuning" or name.endswith("bias"):
                        path, _, kind = name.rpartition(".")
                        own = f"{OWN.get(path, path)}.{kind}".replace(".", "_")
                        yield f"{blocks}.{index}.{own}", Target([weight])
        elif tuner in MODULES:
            for index, sites in modules[tuner].items():
                for name, target in MODULES[tuner](encoder, int(index), sites):
                    yield f"{blocks}.{index}.{name}", target
        else:
            raise UserError(f"LIFT+ has no {tuner} in a transformer")


def _check_scales(encoder: TransformerEncoder, tuners: Sequence[str]) -> None:
    blocks = {name: list(encoder.tuned_blocks[name]) for name in ("ssf_attn", "ssf_mlp") if name in tuners}
    if blocks and (len(blocks) < 2 or blocks["ssf_attn"] != blocks["ssf_mlp"]):
        raise UserError(
            "LIFT+ scales and shifts attention and MLP of a block together: ssf_attn and ssf_mlp of one encoder"
        )


def _prompt(encoder: TransformerEncoder, index: int, sites: Any) -> NamedTargets:
    yield "prompt", Target([sites["tokens"].prompt])


def _lora(encoder: TransformerEncoder, index: int, sites: Any) -> NamedTargets:
    for site in ("q", "v"):
        yield f"attn.lora.{site}.down", Target([sites[site].lora_A])
        yield f"attn.lora.{site}.up", Target([sites[site].lora_B])


def _bottleneck(module: nn.Module, prefix: str) -> NamedTargets:
    for theirs, ours in ADAPTER.items():
        for kind in ("weight", "bias"):
            yield f"{prefix}.{theirs}.{kind}", Target([module.get_submodule(ours).get_parameter(kind)])


def _adapter(encoder: TransformerEncoder, index: int, sites: Any) -> NamedTargets:
    return _bottleneck(sites["mlp"], "mlp.adapter")


def _adaptformer(encoder: TransformerEncoder, index: int, sites: Any) -> NamedTargets:
    if isinstance(sites["mlp"].scale, nn.Parameter):
        yield "adaptformer.scale", Target([sites["mlp"].scale[0]])  # a number in LIFT+, a vector of one here
    yield from _bottleneck(sites["mlp"], "adaptformer")


def _ssf_attn(encoder: TransformerEncoder, index: int, sites: Any) -> NamedTargets:
    for kind in ("scale", "shift"):
        yield f"attn.ssf.in_proj.{kind}", Target([sites[site].get_parameter(kind) for site in "qkv"])
        yield f"attn.ssf.out_proj.{kind}", Target([sites["proj"].get_parameter(kind)])


def _ssf_mlp(encoder: TransformerEncoder, index: int, sites: Any) -> NamedTargets:
    for kind in ("scale", "shift"):
        yield f"mlp.ssf.in_proj.{kind}", Target([sites["fc1"].get_parameter(kind)])
        yield f"mlp.ssf.out_proj.{kind}", Target([sites["fc2"].get_parameter(kind)])


def _aft(encoder: TransformerEncoder, index: int, sites: Any) -> NamedTargets:
    for name, masks in sites.items():
        tower, _, layer = PATHS[name].partition(".")
        linear: Any = encoder.layers(index)[name]
        is_bias = masks.positions >= linear.weight.numel()
        for kind, chosen, start in (("weight", ~is_bias, 0), ("bias", is_bias, linear.weight.numel())):
            tensor = getattr(linear, kind)
            if tensor is not None:
                stem = f"{tower}.aft.{layer}.masked_{kind}"
                yield f"{stem}.optimized_params", Target([masks.values], chosen)
                yield f"{stem}.mask", MaskTarget([masks.positions], chosen, tensor.shape, start)


MODULES: Any = {
    "vpt_shallow": _prompt,
    "vpt_deep": _prompt,
    "lora": _lora,
    "adapter": _adapter,
    "adaptformer": _adaptformer,
    "ssf_attn": _ssf_attn,
    "ssf_mlp": _ssf_mlp,
    "aft": _aft,
}
"""Tuner → function that gives the keys of its modules in a block."""


def _text(model: ClassificationModel, tower: TextTower) -> NamedTargets:
    """The keys of what trains in the text tower and behind both encoders."""
    yield from _transformer(tower, [*tower.tuned_blocks], TEXT_BLOCKS)
    if tower.context is not None:
        if not isinstance(tower.context, Vectors) or tower.context.copies > 1:
            raise UserError("LIFT+ has no contexts of MaPLe and none of each class")
        yield "text_encoder.ctx", Target([tower.context.vectors])
    head = cast(TextClassifier, heads_of(model.head)[0])
    adapters = {"image_adapter": head.adapter, "text_adapter": tower.adapter}
    for name, adapter in adapters.items():
        if adapter is not None:
            if not isinstance(adapter, ResidualAdapter):
                raise UserError("LIFT+ has clip_adapter residual only")
            yield from _bottleneck(adapter, name)
    for name, projection in (("image_proj", model.encoder.projection), ("text_proj", tower.projection)):
        if projection is not None and projection.requires_grad:
            yield name, TransposedTarget([projection])


def _resnet(encoder: Any, tuners: Sequence[str]) -> NamedTargets:
    """The keys of tuners on a residual network, whose blocks LIFT+ numbers through all stages."""
    if not isinstance(encoder, WholeNetworkEncoder) or not hasattr(encoder.net, RESNET_STAGES[-1]):
        raise UserError("LIFT+ has ViTs and residual networks only, so no checkpoint of its kind fits this backbone")
    for tuner in tuners:
        if tuner == "ssf_attn":
            state = encoder.tuners[tuner].state_dict(keep_vars=True)
            yield from ((f"image_encoder.ssf.{name}", Target([tensor])) for name, tensor in state.items())
        elif tuner in ("full_tuning", "bias_tuning"):
            for name, weight in _of_stages(encoder.net):
                if tuner == "full_tuning" or name.endswith("bias"):
                    yield f"{BLOCKS}.{name.replace('.', '_')}", Target([weight])
        else:
            raise UserError(f"LIFT+ has no {tuner} on a residual network")


def _of_stages(net: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the four stages under LIFT+'s names, `<block>.<path>`. Raises `UserError` if others train."""
    if any(each.requires_grad for name, each in net.named_parameters() if not name.startswith(RESNET_STAGES)):
        raise UserError(
            "LIFT+ tunes the four stages of a residual network alone: full_tuning_layers 4, bias_tuning_layers 4"
        )
    blocks = [block for stage in RESNET_STAGES for block in getattr(net, stage)]
    for index, block in enumerate(blocks):
        yield from ((f"{index}.{name}", parameter) for name, parameter in block.named_parameters())
