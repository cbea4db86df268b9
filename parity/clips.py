"""Small CLIPs with random weights, for the originals' processes: torch alone is imported."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def openai_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of OpenAI's class `CLIP` for the model that open_clip builds from a config."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    arguments = {"embed_dim": config["embed_dim"], "context_length": text["context_length"]}
    arguments |= {"image_resolution": vision["image_size"], "vocab_size": text["vocab_size"]}
    arguments |= {f"vision_{key}": vision[key] for key in ("layers", "width", "patch_size")}
    return arguments | {f"transformer_{key}": text[key] for key in ("width", "heads", "layers")}


@torch.no_grad()
def random_weights(build: Callable[[], nn.Module], seed: int) -> dict[str, Tensor]:
    """Random weights, biases, norms and running statistics of a backbone.

    The shifts of batch norms are near 1 and -1. Otherwise rounding would decide whether some ReLUs are on or off, and
    that changes a gradient by a percent.
    """
    torch.manual_seed(seed)
    model = build()
    for parameter in model.parameters():
        if parameter.ndim <= 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.bias.add_(torch.tensor((1.0, -1.0)).repeat(len(norm.bias) // 2))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def shake(parameters: Iterable[nn.Parameter], seed: int) -> None:
    """Move parameters off their starts (zero, one, the backbone's values), by noise of 0.05 that is exact in fp32."""
    draws = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        noise = 0.05 * torch.randn(parameter.shape, generator=draws, dtype=torch.float32)
        parameter.copy_((parameter.to(torch.float32) + noise).to(parameter.dtype))
