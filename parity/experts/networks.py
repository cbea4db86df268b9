"""What the originals' side does with their networks: changes before a comparison, and their logits."""

from typing import Any

import torch
from torch import Tensor, nn

from tailtune.parity.job import Tensors


def named(prefix: str, tensors: Tensors) -> Tensors:
    """Copies of tensors below a prefix, without the original's `backbone.`."""
    return {f"{prefix}.{name.removeprefix('backbone.')}": tensor.clone() for name, tensor in tensors.items()}


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Move batch norms off ones and zeros, their running statistics too."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.mul_(torch.exp(0.1 * torch.randn_like(tensor))).add_(
                0 if "var" in name else 0.05 * torch.randn_like(tensor)
            )


def without_dropout(model: nn.Module) -> None:
    """Set every dropout of a network to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0


@torch.no_grad()
def ask_half(model: Any, images: Tensor) -> None:
    """Shift the bias of an expert assignment so that about half of the images [B, 3, H, W] ask a second expert."""
    outputs: list[Tensor] = []
    layer = model.backbone.expert_help_pred_fc
    hook = layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    model.eval()(images)
    hook.remove()
    middle = len(images) // 2
    layer.bias -= outputs[0].flatten().sort().values[middle - 1 : middle + 1].mean()


@torch.no_grad()
def evaluated(model: nn.Module, images: Tensor) -> Tensors:
    """Evaluation mode: `logits` of the experts [B, E, C].

    Of an expert assignment: their `mean` [B, C], and how many experts were `asked` [B].
    """
    output = model.eval()(images)
    if isinstance(output, tuple):
        return {"mean": output[0], "asked": output[1].flatten()}
    if isinstance(output, dict):
        return {"logits": output["logits"]}
    experts = getattr(model.backbone, "logits", None)
    return {"logits": output.unsqueeze(1) if experts is None else torch.stack(list(experts), 1)}
