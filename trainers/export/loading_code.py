"""How others use what was exported, as Python that runs in its folder: `prepare` an image, `predict` logits."""

from typing import Any

from tailtune.models.heads.classifiers import LinearClassifier
from tailtune.trainers.export.exported_model import FORMULAS, ExportedModel, before_head

MODULES = ("functools", "open_clip", "peft", "timm")
HEAD = "head.safetensors"
WITHIN = "logits = net(images): it is part of the network"


def preprocessing(subject: ExportedModel, inside: bool = False) -> dict[str, Any]:
    """What happens to an image, from the file to the network.

    Args:
        inside: the exported network takes uint8 and normalises itself.
    """
    mean, std = (each.flatten().tolist() for each in (subject.method.model.mean, subject.method.model.std))
    normal = {"dtype": "uint8", "value_range": [0, 255], "mean": None, "std": None}
    if not inside:
        normal = {"dtype": "float32", "value_range": [0, 1], "mean": mean, "std": std}
    return {
        "exif_orientation": True,
        "color": "RGB",
        "resize_shorter_side": subject.resize or subject.resolution,
        "interpolation": subject.interpolation,
        "antialias": True,
        "center_crop": subject.resolution,
        "layout": "NCHW",
        **normal,
    }


def how_to_prepare(steps: dict[str, Any]) -> str:
    """Code of `prepare`, which makes a tensor [3, R, R] of an image of Pillow as `steps` say."""
    mode = f"InterpolationMode.{steps['interpolation'].upper()}"
    resize = f"v2.Resize({steps['resize_shorter_side']}, interpolation={mode}, antialias={steps['antialias']})"
    lines = [
        "import torch",
        "from PIL import ImageOps",
        "from torchvision.transforms import InterpolationMode, v2",
        f"cut = v2.Compose([{resize}, v2.CenterCrop({steps['center_crop']}), v2.PILToTensor()])",
    ]
    if steps["mean"] is None:
        return "\n".join(
            [*lines, "def prepare(image):", "    return cut(ImageOps.exif_transpose(image).convert('RGB'))"]
        )
    lines += [f"{name} = torch.tensor({steps[name]}).view(3, 1, 1)" for name in ("mean", "std")]
    normalised = "    return (cut(ImageOps.exif_transpose(image).convert('RGB')).float() / 255 - mean) / std"
    return "\n".join([*lines, "def prepare(image):", normalised])


def how_to_load(network: str, head: list[str]) -> str:
    """Code of `predict`, which makes logits [B, C] of prepared images [B, 3, R, R].

    Args:
        network: code that makes `net`.
        head: lines that follow, as `head_beside` or `HEAD_WITHIN`.
    """
    used = [module for module in MODULES if f"{module}." in network]
    lines = [f"import {', '.join([*used, 'torch'])}", "import torch.nn.functional as F"]
    return "\n".join([*lines, "from safetensors.torch import load_file", network, "net.eval()", *head])


HEAD_WITHIN = ["@torch.no_grad()", "def predict(images):", "    return net(images)"]


def head_beside(subject: ExportedModel) -> list[str]:
    """Lines that read a head which stands in a file of its own, and apply it."""
    head = subject.head
    tensors = ["weight", *(["bias"] if isinstance(head, LinearClassifier) else [])]
    lines = [f"head = load_file({HEAD!r})", *(f"{name} = head[{name!r}]" for name in tensors)]
    if "scale *" in FORMULAS[type(head)]:
        lines.append(f"scale = {head.scale!r}")
    own = ["features = net(images)", *before_head(subject), FORMULAS[type(head)], "return logits"]
    return [*lines, "@torch.no_grad()", "def predict(images):", *(f"    {line}" for line in own)]
