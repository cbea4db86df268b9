"""What the originals' side of parity_experts.py does with their networks."""

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def named(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}.{name.removeprefix('backbone.')}": each.clone() for name, each in tensors.items()}


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Batch norms away from ones and zeros, running statistics too."""
    for name, each in model.state_dict().items():
        if each.is_floating_point() and each.ndim == 1:
            each.mul_(torch.exp(0.1 * torch.randn_like(each))).add_(
                0 if "var" in name else 0.05 * torch.randn_like(each)
            )


def without_dropout(model: nn.Module) -> None:
    for each in model.modules():
        if isinstance(each, nn.Dropout):
            each.p = 0.0
        elif isinstance(each, nn.MultiheadAttention):
            each.dropout = 0.0


@torch.no_grad()
def halfway(model: nn.Module, images: Tensor) -> None:
    """Shift the bias of expert assignment so that about half of the images ask a second expert."""
    seen: list[Tensor] = []
    layer = model.backbone.expert_help_pred_fc
    hook = layer.register_forward_hook(lambda _, __, out: seen.append(out))
    model.eval()(images)
    hook.remove()
    middle = len(images) // 2
    layer.bias -= seen[0].flatten().sort().values[middle - 1 : middle + 1].mean()


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor) -> Tensors:
    """Logits of the experts [B, E, C], or of an assignment the mean [B, C] and how many experts were asked."""
    output = model.eval()(images)
    if isinstance(output, tuple):
        return {"mean": output[0], "asked": output[1].flatten()}
    if isinstance(output, dict):
        return {"logits": output["logits"]}
    experts = getattr(model.backbone, "logits", None)
    return {"logits": output.unsqueeze(1) if experts is None else torch.stack(list(experts), 1)}
