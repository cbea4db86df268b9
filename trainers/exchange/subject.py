"""What is exported: a trained model and the facts that another program needs to use it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from configs.errors import UserError
from models.heads import CosineClassifier, L2NormedClassifier, LayerNormedClassifier, LinearClassifier
from models.peft_adapter import Peft
from trainers.methods import Method

FORMULAS: dict[type[nn.Module], str] = {
    CosineClassifier: "logits = scale * normalize(features) @ normalize(weight).T",
    LinearClassifier: "logits = features @ weight.T + bias",
    L2NormedClassifier: "logits = features @ normalize(weight).T",
    LayerNormedClassifier: "logits = layer_norm(features, eps=1e-12) @ normalize(weight).T",
}
"""Head → how it is applied, in words of torch.nn.functional; `normalize` is to unit rows."""


@dataclass(frozen=True)
class Subject:
    """A trained model on the CPU, in fp32 and eval mode.

    Args:
        tuners: names of ours that are on.
        partial: the option.
        arch: open_clip's name of the backbone, if it is from there.
        facts: where it comes from, for every format.
    """

    method: Method
    tuners: Sequence[str]
    partial: Any
    class_names: Sequence[str]
    resolution: int
    zero_shot: bool = False
    arch: str | None = None
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
        changes = type(self.method).expert_logits is not Method.expert_logits
        if changes and getattr(self.method, "scales", True) is not None:  # H2T may learn factors, or not
            raise UserError(
                f"export {name}: it holds a network with a head, and this method changes the logits of its head; "
                "`export onnx` keeps that"
            )

    @property
    def peft(self) -> Peft | None:
        return self.method.model.peft

    def images(self, count: int) -> Tensor:
        """Random uint8 images [count, 3, R, R] to compare two formats on."""
        generator = torch.Generator().manual_seed(count)
        shape = (count, 3, self.resolution, self.resolution)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    def describe(self) -> dict[str, Any]:
        """What every exported folder says of its model."""
        model = self.method.model
        mean, std = (each.flatten().tolist() for each in (model.mean, model.std))
        head: dict[str, Any] = {"type": type(self.head).__name__, "apply": FORMULAS.get(type(self.head))}
        if isinstance(self.head, CosineClassifier):
            head["scale"] = self.head.scale
        pixels = {"resolution": self.resolution, "mean": mean, "std": std, "range": "RGB / 255 before mean and std"}
        if getattr(self.encoder, "projection", None) is not None:
            head["before"] = "features = features @ projection.T"
        return {**self.facts, "images": pixels, "head": head, "class_names": list(self.class_names)}


def linear_head(head: nn.Module) -> dict[str, Tensor] | None:
    """The head as one linear layer of the features, None where it is none."""
    weight = head.get_parameter("weight").detach().float()
    if type(head) is LinearClassifier:
        return {"weight": weight, "bias": head.bias.detach().float()}
    if type(head) is L2NormedClassifier:
        return {"weight": F.normalize(weight, dim=-1), "bias": torch.zeros(len(weight))}
    return None


def save_head(subject: Subject, folder: Path) -> None:
    """The head's own tensors, and the projection before it where the encoder ends in one."""
    state = dict(subject.head.state_dict())
    if getattr(subject.encoder, "projection", None) is not None:
        state["projection"] = subject.encoder.projection
    save_state(state, folder / "head.safetensors")


def save_state(state: dict[str, Tensor], path: Path) -> None:
    """safetensors, fp32; `format` is what transformers and timm look for."""
    ready = {name: each.float() if each.is_floating_point() else each for name, each in state.items()}
    copies = {name: each.detach().cpu().clone(memory_format=torch.contiguous_format) for name, each in ready.items()}
    save_file(copies, path, {"format": "pt"})
