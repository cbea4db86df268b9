"""Layers of a ViT's block as functions, in the dtype of the stream, with what tuners do at their sites."""

from typing import Any

import torch.nn.functional as F
from timm.layers import LayerScale
from torch import Tensor, nn


def apply_tuners(modules: list[nn.Module], y: Any, x: Tensor) -> Any:
    """What the modules at a site make of its output y; x is the site's input."""
    for module in modules:
        y = module(y, x)
    return y


def norm(x: Tensor, layer: Any) -> Tensor:
    if not isinstance(layer, nn.LayerNorm):
        return layer(x)  # none at this place, or a wrapped one
    return F.layer_norm(x, layer.normalized_shape, _cast(layer.weight, x), _cast(layer.bias, x), layer.eps)


def layer_scale(x: Tensor, scale: Any) -> Tensor:
    """Layer scale, where the network has it."""
    return x * scale.gamma.to(x.dtype) if isinstance(scale, LayerScale) else x


def _cast(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """A parameter in the dtype of the stream: what trains stays fp32 beside bf16."""
    return None if parameter is None else parameter.to(x.dtype)


def _weights(layer: nn.Linear, modules: list[nn.Module], x: Tensor) -> tuple[Any, Any]:
    weight, bias = apply_tuners(modules, (layer.weight, layer.bias), x)
    return _cast(weight, x), _cast(bias, x)


def linear(x: Tensor, layer: Any, modules: list[nn.Module]) -> Tensor:
    if type(layer) is not nn.Linear:
        return layer(x)  # a wrapped layer knows better
    return F.linear(x, *_weights(layer, modules, x))


def project(x: Tensor, queries: Tensor, qkv: Any, modules: list[nn.Module]) -> tuple[Tensor, ...]:
    """Packed projection → q of `queries`, k and v of `x`, each [B, ·, D]; one GEMM when both are the same tokens."""
    if queries is x:
        return linear(x, qkv, modules).chunk(3, dim=-1)
    if type(qkv) is not nn.Linear:
        q, k, v = qkv(x).chunk(3, dim=-1)
        return q[:, : queries.shape[1]], k, v
    weight, bias = _weights(qkv, modules, x)
    width = len(weight) // 3
    q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
    k, v = F.linear(x, weight[width:], kv_bias).chunk(2, dim=-1)
    return F.linear(queries, weight[:width], q_bias), k, v
