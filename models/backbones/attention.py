"""Attention as a ViT computes it, with the fastest kernel that torch has for the device and the dtype."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_GRADIENTS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

AT_ONCE = 2**19
"""Number of queries times their width that a thread computes at once: 2 MB in fp32."""


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √D + mask) v (arXiv 1706.03762, equation 1).

    In bf16 on a CPU, torch's fused backward pass takes up to 10 times as long as in fp32 (docs/results.md), so where
    gradients are wanted the arithmetic is fp32 there. What is kept for the backward pass stays in bf16.

    Args:
        q: queries [B, H, M, D].
        k: keys [B, H, N, D].
        v: values [B, H, N, D].
        mask: what may be seen, broadcastable to [B, H, M, N]: True, or a number that is added; None: all.

    Returns:
        [B, H, M, D].
    """
    if _slow_in_training(q) and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        return cast(Tensor, _InFp32.apply(q, k, v, _added(mask, q, k)))
    return F.scaled_dot_product_attention(q, k, v, mask)


def _slow_in_training(q: Tensor) -> bool:
    return q.dtype == torch.bfloat16 and q.device.type == "cpu" and not torch.compiler.is_compiling()


def _added(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A mask as the kernel takes it: numbers [B, H, M, N] in fp32."""
    if mask is None:
        return None
    numbers = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask.float()
    return numbers.expand(*q.shape[:3], k.shape[2])


class _InFp32(torch.autograd.Function):
    """Attention in fp32 of tensors in another dtype, a few images at once: the copies in fp32 fit in the cache."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out, logsumexp = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        for part in _parts(q, k):
            seen = None if mask is None else mask[part]
            out[part], logsumexp[part] = _ATTENTION(q[part].float(), k[part].float(), v[part].float(), attn_mask=seen)
        ctx.save_for_backward(q, k, v, out, logsumexp, mask)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *narrow, logsumexp, mask = ctx.saved_tensors
        q, k, v, _ = narrow
        found = tuple(torch.empty_like(tensor) for tensor in (q, k, v))
        for part in _parts(q, k):
            seen = None if mask is None else mask[part]
            wide = (tensor[part].float() for tensor in (*grads, *narrow))
            gradients = _GRADIENTS(*wide, logsumexp[part], 0.0, False, attn_mask=seen)
            for whole, gradient in zip(found, gradients, strict=True):
                whole[part] = gradient
        return (*found, None)


def _parts(q: Tensor, k: Tensor) -> list[slice]:
    """The images that are computed at once."""
    images = max(1, AT_ONCE * torch.get_num_threads() // max(q[0].numel(), k[0].numel()))
    return [slice(start, start + images) for start in range(0, len(q), images)]
