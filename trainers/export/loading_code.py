"""Generates Python code for `facts.json` and `infer.py`: `prepare` converts an image, and `predict` computes logits.

The code has to run in the exported folder.
"""

from typing import Any

from tailtune.trainers.export.exported_model import FORMULAS, ExportedModel, before_head, options_of_head

MODULES = ("functools", "open_clip", "peft", "timm")
HEAD = "head.safetensors"
APPLY_WITHIN = "logits = net(images): it is part of the network"


def preprocessing(exported: ExportedModel, inside: bool = False) -> dict[str, Any]:
    """Describe, for `facts.json`, the preprocessing of an image before the network.

    Args:
        exported: the model.
        inside: True if the exported network takes uint8 images and normalises them itself.
    """
    model = exported.method.model
    mean, std = (stats.flatten().tolist() for stats in (model.mean, model.std))
    pixels = {"dtype": "uint8", "value_range": [0, 255], "mean": None, "std": None}
    if not inside:
        pixels = {"dtype": "float32", "value_range": [0, 1], "mean": mean, "std": std}
    return {
        "exif_orientation": True,
        "color": "RGB",
        "resize_shorter_side": exported.resize or exported.resolution,
        "interpolation": exported.interpolation,
        "antialias": True,
        "center_crop": exported.resolution,
        "layout": "NCHW",
        **pixels,
    }


def how_to_prepare(steps: dict[str, Any]) -> str:
    """Code of the function `prepare`, which converts an image of Pillow. It needs Pillow and NumPy.

    For a network that takes uint8 images, `prepare` returns a NumPy array uint8 [3, R, R]. Otherwise it returns a
    normalised tensor [3, R, R], and the code needs torch, too.

    Args:
        steps: return value of `preprocessing`.
    """
    side = steps["center_crop"]
    body = [
        "image = ImageOps.exif_transpose(image).convert('RGB')",
        f"width, height = (int({steps['resize_shorter_side']} * side / min(image.size)) for side in image.size)",
        f"image = image.resize((width, height), Image.Resampling.{steps['interpolation'].upper()})",
        f"left, top = (round((side - {side}) / 2) for side in (width, height))",
        f"pixels = numpy.array(image.crop((left, top, left + {side}, top + {side}))).transpose(2, 0, 1)",
    ]
    if steps["mean"] is None:
        lines, result = ["import numpy", "from PIL import Image, ImageOps"], "pixels"
    else:
        lines = ["import numpy", "import torch", "from PIL import Image, ImageOps"]
        lines += [f"{name} = torch.tensor({steps[name]}).view(3, 1, 1)" for name in ("mean", "std")]
        result = "(torch.from_numpy(pixels).float() / 255 - mean) / std"
    return "\n".join([*lines, "def prepare(image):", *(f"    {line}" for line in (*body, f"return {result}"))])


def how_to_load(network: str, head: list[str]) -> str:
    """Code of the function `predict`, which computes logits [B, C] from prepared images [B, 3, R, R].

    Args:
        network: code that creates the network `net` and loads its weights.
        head: the lines of code after that: return value of `separate_head`, or `HEAD_WITHIN`.
    """
    used = [module for module in MODULES if f"{module}." in network]
    lines = [f"import {', '.join([*used, 'torch'])}", "import torch.nn.functional as F"]
    return "\n".join([*lines, "from safetensors.torch import load_file", network, "net.eval()", *head])


HEAD_WITHIN = ["@torch.no_grad()", "def predict(images):", "    return net(images)"]
"""Lines of code for a head that is a layer of the network."""


def separate_head(exported: ExportedModel) -> list[str]:
    """Lines of code that read the head from a separate file and apply it."""
    head = exported.head
    lines = [f"head = load_file({HEAD!r})", *(f"{name} = head[{name!r}]" for name in head.state_dict())]
    lines += [f"{name} = {value!r}" for name, value in options_of_head(head).items()]
    body = ["features = net(images)", *before_head(exported), FORMULAS[type(head)], "return logits"]
    return [*lines, "@torch.no_grad()", "def predict(images):", *(f"    {line}" for line in body)]
