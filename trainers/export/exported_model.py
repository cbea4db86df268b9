"""What is exported: a trained model and the facts that another program needs to use it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from safetensors.torch import save
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.models.backbones.generic import GenericEncoder
from tailtune.models.backbones.spec import Published
from tailtune.models.backbones.vit_layers import at_site
from tailtune.models.heads.classifiers import (
    CosineClassifier,
    L2NormedClassifier,
    LayerNormedClassifier,
    LinearClassifier,
)
from tailtune.models.tuners.peft_adapter import PeftAdapter
from tailtune.trainers.methods import Method
from tailtune.trainers.storage.atomic_io import write_bytes

FORMULAS: dict[type[nn.Module], str] = {
    CosineClassifier: "logits = scale * F.normalize(features, dim=-1) @ F.normalize(weight, dim=-1).T",
    LinearClassifier: "logits = features @ weight.T + bias",
    L2NormedClassifier: "logits = features @ F.normalize(weight, dim=-1).T",
    LayerNormedClassifier: (
        "logits = F.layer_norm(features, features.shape[-1:], eps=1e-12) @ F.normalize(weight, dim=-1).T"
    ),
}
"""Head → how it is applied, in Python with torch.nn.functional as F."""


@dataclass(frozen=True)
class ExportedModel:
    """A trained model on the CPU, in fp32 and eval mode.

    Args:
        tuners: names of ours that are on.
        partial: the option.
        arch: open_clip's name of the backbone, if it is from there.
        base: where others find the pre-trained weights; None: nowhere.
        resize: side to which the shorter side of a test image is resized before the centre is cut out; None: that of
            the centre.
        command: words of the command that trained it.
        facts: where it comes from, for every format.
    """

    method: Method
    tuners: Sequence[str]
    partial: Any
    class_names: Sequence[str]
    resolution: int
    zero_shot: bool = False
    arch: str | None = None
    base: Published | None = None
    resize: int | None = None
    interpolation: str = "bilinear"
    command: Sequence[str] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def encoder(self) -> Any:
        return self.method.model.encoder

    @property
    def head(self) -> nn.Module:
        return self.method.model.head

    @property
    def experts(self) -> int:
        return self.method.model.num_experts

    def refuse_experts(self, name: str) -> None:
        """Raise a `UserError` where there are several, for a format that holds one network with one head.

        Likewise where a method makes something else of the head's logits.
        """
        if self.experts > 1:
            raise UserError(
                f"export {name}: it holds one network with one head, and this model has {self.experts} experts; "
                "`export onnx` keeps them"
            )
        if self.method.changes_head_logits:
            raise UserError(
                f"export {name}: it holds a network with a head, and this method changes the logits of its head; "
                "`export onnx` keeps that"
            )

    @property
    def peft(self) -> PeftAdapter | None:
        return self.method.model.peft

    def images(self, count: int) -> Tensor:
        """Random uint8 images [count, 3, R, R] to compare two formats on."""
        generator = torch.Generator().manual_seed(count)
        shape = (count, 3, self.resolution, self.resolution)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    def describe(self) -> dict[str, Any]:
        """What every exported folder says of its model."""
        head: dict[str, Any] = {"type": type(self.head).__name__, "apply": FORMULAS.get(type(self.head))}
        if isinstance(self.head, CosineClassifier):
            head["scale"] = self.head.scale
        return {**self.facts, "head": head, "class_names": list(self.class_names)}


def linear_head(head: nn.Module) -> dict[str, Tensor] | None:
    """The head as one linear layer of the features, None where it is none."""
    weight = head.get_parameter("weight").detach().float()
    if type(head) is LinearClassifier:
        return {"weight": weight, "bias": head.bias.detach().float()}
    if type(head) is L2NormedClassifier:
        return {"weight": F.normalize(weight, dim=-1), "bias": torch.zeros(len(weight))}
    return None


def before_head(subject: ExportedModel) -> list[str]:
    """What happens to the features of the plain network before the head, line by line in Python."""
    lines = ["features = features * head['feature_scale'] + head['feature_shift']"] if feature_affine(subject) else []
    if subject.encoder.projection is not None:
        lines.append("features = features @ head['projection'].T")
    return lines


def feature_affine(subject: ExportedModel) -> tuple[Tensor, Tensor] | None:
    """What tuners on the feature do to each of its entries, scale and shift [D]; None where no layer is before them
    that could take them, or none of them is there."""
    host = subject.encoder
    if not isinstance(host, GenericEncoder) or not len(host.tuners) or isinstance(host.net, ModifiedResNet):
        return None
    return affine_of(host)


def affine_of(host: GenericEncoder) -> tuple[Tensor, Tensor]:
    """Scale and shift [D] that the tuners on a feature come to, fp64."""
    modules = [copy.deepcopy(each).double() for each in host.tuners.values()]
    ones = torch.ones(host.feature_dim, dtype=torch.float64)
    shift = at_site(modules, 0 * ones, ones)
    return at_site(modules, ones, ones) - shift, shift


def save_head(subject: ExportedModel, folder: Path) -> None:
    """The head's own tensors, and those of `before_head`."""
    state = dict(subject.head.state_dict())
    if subject.encoder.projection is not None:
        state["projection"] = subject.encoder.projection
    if affine := feature_affine(subject):
        state |= dict(zip(("feature_scale", "feature_shift"), affine, strict=True))
    save_state(state, folder / "head.safetensors")


def save_state(state: dict[str, Tensor], path: Path) -> None:
    """safetensors, fp32; `format` is what transformers and timm look for."""
    ready = {name: each.float() if each.is_floating_point() else each for name, each in state.items()}
    copies = {name: each.detach().cpu().clone(memory_format=torch.contiguous_format) for name, each in ready.items()}
    write_bytes(path, save(copies, {"format": "pt"}))
