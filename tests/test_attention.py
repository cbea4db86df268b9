"""fused_attention: in bf16 on a CPU its gradients are those of fp32, and otherwise it is torch's attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tailtune.models.backbones.attention import fused_attention

CAUSAL = torch.ones(9, 9, dtype=torch.bool).tril()
MASKS = {
    "none": None,
    "may be seen": CAUSAL,
    "added": torch.zeros(9, 9, dtype=torch.bfloat16).masked_fill(~CAUSAL, -torch.inf),
    "of each image": CAUSAL.expand(4, 1, 9, 9),
}


def inputs(dtype: torch.dtype, queries: int = 9) -> list[Tensor]:
    """q [4, 2, queries, 16], k and v [4, 2, 9, 16], as parts of a packed tensor."""
    packed = torch.randn(4, 9, 3, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16().to(dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()
    return [each.detach().requires_grad_() for each in (q[:, :, :queries], k, v)]


def gradients(kernel: object, dtype: torch.dtype, mask: Tensor | None, queries: int) -> list[Tensor]:
    given = inputs(dtype, queries)
    mask = mask.to(dtype) if mask is not None and mask.dtype != torch.bool else mask
    out = kernel(*given, mask if mask is None else mask[..., :queries, :])  # type: ignore[operator]
    assert out.dtype == dtype
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
    return [out.detach(), *torch.autograd.grad(out, given, weights)]


@pytest.mark.parametrize("queries", [9, 1])
@pytest.mark.parametrize("mask", MASKS)
def test_bf16_agrees_with_fp64_at_least_as_well_as_torch_does(mask: str, queries: int) -> None:
    exact = gradients(F.scaled_dot_product_attention, torch.float64, MASKS[mask], queries)
    found = gradients(fused_attention, torch.bfloat16, MASKS[mask], queries)
    of_torch = gradients(F.scaled_dot_product_attention, torch.bfloat16, MASKS[mask], queries)
    for true, ours, theirs in zip(exact, found, of_torch, strict=True):
        assert ours.dtype == torch.bfloat16 and ours.shape == true.shape
        assert (ours - true).norm() <= 1.05 * (theirs - true).norm() + 1e-3 * true.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_get_torchs_attention(dtype: torch.dtype) -> None:
    ours, theirs = (gradients(kernel, dtype, CAUSAL, 9) for kernel in (fused_attention, F.scaled_dot_product_attention))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_without_gradients_it_is_torchs_attention() -> None:
    q, k, v = inputs(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(fused_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    frozen = [each.detach() for each in (q, k, v)]
    assert torch.equal(fused_attention(*frozen), F.scaled_dot_product_attention(*frozen))


def test_all_that_it_keeps_for_the_backward_pass_is_bf16() -> None:
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        fused_attention(*inputs(torch.bfloat16))
    wide = [each for each in kept if each.dtype != torch.bfloat16]
    assert [each.dim() for each in wide] == [3], "only one number for each query is in fp32"
    assert len(kept) == 5
