"""The layers of a ViT's block as functions; tuners act here, where `apply_tuners` is called.

Every function computes in the dtype of its input and casts weights to that dtype.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def apply_tuners(modules: list[nn.Module], y: Any, x: Tensor) -> Any:
    """Let the tuners at a site change its output.

    Args:
        modules: the tuners' modules at this site, in the order in which they act; each is called as `module(y, x)`.
        y: the output of the site; for a site on weights the pair of a layer's weight and bias.
        x: the input of the site.

    Returns:
        The changed output, of the kind of `y`.
    """
    for module in modules:
        y = module(y, x)
    return y


def norm(x: Tensor, layer: Any) -> Tensor:
    """Layer norm of x [..., D], in the dtype of x."""
    if not isinstance(layer, nn.LayerNorm):
        return layer(x)  # an nn.Identity, or a layer that peft has wrapped
    return F.layer_norm(x, layer.normalized_shape, _cast(layer.weight, x), _cast(layer.bias, x), layer.eps)


def layer_scale(x: Tensor, scale: Any) -> Tensor:
    """Multiply x [B, N, D] by the layer scale [D], if the network has one here."""
    return x if isinstance(scale, nn.Identity) else x * scale.gamma.to(x.dtype)


def _cast(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """A parameter in the dtype of x: parameters that train stay in fp32 also where x is in bf16."""
    return None if parameter is None else parameter.to(x.dtype)


def _tuned_weights(layer: nn.Linear, modules: list[nn.Module], x: Tensor) -> tuple[Any, Any]:
    """Weight and bias of a layer after the tuners that act on weights, in the dtype of x."""
    weight, bias = apply_tuners(modules, (layer.weight, layer.bias), x)
    return _cast(weight, x), _cast(bias, x)


def linear(x: Tensor, layer: Any, modules: list[nn.Module]) -> Tensor:
    """A linear layer, [..., in] → [..., out].

    Args:
        x: input.
        layer: an nn.Linear, or what peft has put in its place.
        modules: tuners that act on the layer's weights.
    """
    if type(layer) is not nn.Linear:
        return layer(x)  # peft's wrapper has a forward of its own
    return F.linear(x, *_tuned_weights(layer, modules, x))


def project_qkv(x: Tensor, queries: Tensor, qkv: Any, modules: list[nn.Module]) -> tuple[Tensor, ...]:
    """Query, key and value from one packed linear layer.

    Args:
        x: all tokens [B, N, D].
        queries: the tokens whose attention is wanted: `x` itself, or M of its tokens [B, M, D], which have to be the
            first ones where peft has wrapped the layer.
        qkv: the packed layer, D → 3D.
        modules: tuners that act on the layer's weights.

    Returns:
        q [B, M, D], k [B, N, D], v [B, N, D]. One matrix product computes them where `queries` is `x`.
    """
    if queries is x:
        return linear(x, qkv, modules).chunk(3, dim=-1)
    if type(qkv) is not nn.Linear:
        q, k, v = qkv(x).chunk(3, dim=-1)
        return q[:, : queries.shape[1]], k, v
    weight, bias = _tuned_weights(qkv, modules, x)
    width = len(weight) // 3
    q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
    k, v = F.linear(x, weight[width:], kv_bias).chunk(2, dim=-1)
    return F.linear(queries, weight[:width], q_bias), k, v
