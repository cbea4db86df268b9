"""Holds the model that is exported, and the facts that another program needs in order to use the model."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.configs.lazy_module import lazy_module
from tailtune.configs.option import key_names
from tailtune.models.backbones.backbone_types import PublishedWeights
from tailtune.models.backbones.vit_layers import apply_tuners
from tailtune.models.backbones.whole_network_encoder import WholeNetworkEncoder
from tailtune.models.heads.classifiers import (
    Classifier,
    CosineClassifier,
    L2NormedClassifier,
    LayerNormedClassifier,
    LinearClassifier,
)
from tailtune.models.tuners.peft_adapter import PeftAdapter
from tailtune.trainers.methods import Method
from tailtune.trainers.storage.atomic_io import write_bytes

open_clip = lazy_module("open_clip")

FORMULAS: dict[type[nn.Module], str] = {
    CosineClassifier: "logits = scale * F.normalize(features, dim=-1) @ F.normalize(weight, dim=-1).T",
    LinearClassifier: "logits = features @ weight.T + bias",
    L2NormedClassifier: "logits = features @ F.normalize(weight, dim=-1).T",
    LayerNormedClassifier: (
        "logits = F.layer_norm(features, features.shape[-1:], eps=1e-12) @ F.normalize(weight, dim=-1).T"
    ),
}
"""Class of a head → Python code that applies the head. F is torch.nn.functional; options of the head are variables."""


@dataclass(frozen=True)
class SharedRun:
    """The files and results of a finished run that are shared with its model.

    Args:
        home: folder of the run, with its checkpoint.
        metrics: content of the metrics.json of the evaluation.
    """

    home: Path
    metrics: dict[str, Any]


@dataclass(frozen=True)
class ExportedModel:
    """A trained model on the CPU, in fp32 and eval mode, with the facts that another program needs.

    Args:
        method: the method with its model.
        tuners: names of the tuners of TUNERS that are enabled.
        class_names: names of the C classes, in label order.
        resolution: side length R of the images, in pixels.
        zero_shot: whether the model is a zero-shot classifier, which is not trained.
        arch: open_clip's name of the backbone; None: the backbone is not from open_clip.
        base: where the pre-trained weights are published; None: they are not published.
        resize: length in pixels to which the shorter side of a test image is resized before the centre crop; None:
            `resolution`.
        interpolation: interpolation mode for resizing test images.
        command: words of the command that trained the model.
        facts: where the model comes from, for `facts.json` of every format.
        class_counts: number of training images of each class [C]; empty: not recorded.
        temperature: T of the probabilities softmax(logits / T); None: no validation split gave one.
        half: whether the format `onnx` computes in fp16.
        run: the finished run, for the format `hub`; None: the model is of no run of TailTune.
    """

    method: Method
    tuners: Sequence[str]
    class_names: Sequence[str]
    resolution: int
    zero_shot: bool = False
    arch: str | None = None
    base: PublishedWeights | None = None
    resize: int | None = None
    interpolation: str = "bilinear"
    command: Sequence[str] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    class_counts: Sequence[int] = ()
    temperature: float | None = None
    half: bool = False
    run: SharedRun | None = None

    @property
    def encoder(self) -> Any:
        """The image encoder with its tuners."""
        return self.method.model.encoder

    @property
    def head(self) -> nn.Module:
        """The head, or `ExpertHeads`."""
        return self.method.model.head

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.method.model.num_experts

    def refuse_experts(self, name: str) -> None:
        """Check that the model is one network with one head, for formats that can hold nothing else.

        Args:
            name: name of the format.

        Raises:
            UserError: the model has several experts, or the method changes the logits of the head.
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
        """The adapter of the peft library, if there is one."""
        return self.method.model.peft

    def images(self, count: int) -> Tensor:
        """Random uint8 images [count, 3, R, R], to compare the outputs of two formats."""
        generator = torch.Generator().manual_seed(count)
        shape = (count, 3, self.resolution, self.resolution)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    def describe(self) -> dict[str, Any]:
        """The facts about the model that `facts.json` contains in every format."""
        head = {
            "type": type(self.head).__name__,
            "apply": FORMULAS.get(type(self.head)),
            **options_of_head(self.head),
        }
        return {
            **self.facts,
            "head": head,
            "class_names": list(self.class_names),
            "class_counts": list(self.class_counts) or None,
            "temperature": self.temperature,
        }


def options_of_head(head: nn.Module) -> dict[str, Any]:
    """The values that the formula of a head reads besides its weights, such as `scale`."""
    names = key_names(head.Options) if isinstance(head, Classifier) else ()
    return {name: getattr(head, name) for name in names}


def linear_head(head: nn.Module) -> dict[str, Tensor] | None:
    """The head as one linear layer, `weight` [C, D] and `bias` [C]; None if it is not linear in the features."""
    weight = head.get_parameter("weight").detach().float()
    if type(head) is LinearClassifier:
        return {"weight": weight, "bias": head.bias.detach().float()}
    if type(head) is L2NormedClassifier:
        return {"weight": F.normalize(weight, dim=-1), "bias": torch.zeros(len(weight))}
    return None


def before_head(exported: ExportedModel) -> list[str]:
    """Lines of Python code that transform the features of the plain network before the head is applied."""
    lines = ["features = features * head['feature_scale'] + head['feature_shift']"] if feature_affine(exported) else []
    if exported.encoder.projection is not None:
        lines.append("features = features @ head['projection'].T")
    return lines


def feature_affine(exported: ExportedModel) -> tuple[Tensor, Tensor] | None:
    """The effect of the tuners on the feature, as a scale and a shift of each entry.

    Returns:
        Scale and shift, each [D]; None if there are no such tuners, or if they can be merged into the layer before.
    """
    encoder = exported.encoder
    if (
        not isinstance(encoder, WholeNetworkEncoder)
        or not len(encoder.tuners)
        or isinstance(encoder.net, open_clip.modified_resnet.ModifiedResNet)
    ):
        return None
    return affine_of(encoder)


def affine_of(encoder: WholeNetworkEncoder) -> tuple[Tensor, Tensor]:
    """The combined scale and shift of all tuners on the feature, each fp64 [D]."""
    modules = [copy.deepcopy(module).double() for module in encoder.tuners.values()]
    ones = torch.ones(encoder.feature_dim, dtype=torch.float64)
    shift = apply_tuners(modules, 0 * ones, ones)
    return apply_tuners(modules, ones, ones) - shift, shift


def save_head(exported: ExportedModel, folder: Path) -> None:
    """Write `head.safetensors` with the tensors of the head and the tensors that the code of `before_head` uses."""
    state = dict(exported.head.state_dict())
    if exported.encoder.projection is not None:
        state["projection"] = exported.encoder.projection
    if affine := feature_affine(exported):
        state |= dict(zip(("feature_scale", "feature_shift"), affine, strict=True))
    save_state(state, folder / "head.safetensors")


def save_state(state: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file in fp32, with the metadata entry `format` that transformers and timm expect."""
    copies = {
        name: (tensor.float() if tensor.is_floating_point() else tensor)
        .detach()
        .cpu()
        .clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    write_bytes(path, save(copies, {"format": "pt"}))
