"""The small modules that tuners put at a block's sites, called `module(y, x)`: y the site's output, x its input.

Parameters stay in their own dtype and are cast to the stream's where they are used.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """W_up ReLU(W_down LN(·) + b_down) + b_up, D → r → D; zero at the start because W_up and b_up are zero."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.down_proj = nn.Linear(width, dim)
        self.up_proj = nn.Linear(dim, width)
        nn.init.kaiming_normal_(self.down_proj.weight, a=math.sqrt(5))
        nn.init.zeros_(self.down_proj.bias)
        nn.init.zeros_(self.up_proj.weight)
        nn.init.zeros_(self.up_proj.bias)

    def bottleneck(self, x: Tensor, dtype: torch.dtype, scale: Tensor | float | None = None) -> Tensor:
        """[B, N, D] → [B, N, D] in `dtype`, times `scale`.

        The scale multiplies the small weight instead of the output, which would have to be saved for the backward.
        """
        ln, down, up = self.ln, self.down_proj, self.up_proj
        normed = F.layer_norm(x, ln.normalized_shape, ln.weight.to(x.dtype), ln.bias.to(x.dtype), ln.eps).to(dtype)
        hidden = F.relu(F.linear(normed, down.weight.to(dtype), down.bias.to(dtype)))
        weight, bias = (up.weight, up.bias) if scale is None else (up.weight * scale, up.bias * scale)
        return F.linear(hidden, weight.to(dtype), bias.to(dtype))


class Adapter(Bottleneck):
    """Sequential adapter on the MLP branch: y + A(y) (Houlsby et al. 2019; LIFT's form)."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return y + self.bottleneck(y, y.dtype)


class AdaptFormer(Bottleneck):
    """Parallel adapter: y + s·A(x), x the residual stream before norm2, s learnt from 1 or fixed (Chen et al. 2022)."""

    def __init__(self, width: int, dim: int, scale: float | None = None) -> None:
        super().__init__(width, dim)
        self.scale: nn.Parameter | float = nn.Parameter(torch.ones(1)) if scale is None else scale

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return y + self.bottleneck(x, y.dtype, self.scale)


class Lora(nn.Module):
    """y + (1/r)·(x A) B (Hu et al. 2022). LIFT draws A with fan-in r, so U(-1/√r, 1/√r); B starts at zero."""

    def __init__(self, dim_in: int, dim_out: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.lora_A = nn.Parameter(torch.empty(dim_in, rank))
        self.lora_B = nn.Parameter(torch.zeros(rank, dim_out))
        nn.init.uniform_(self.lora_A, -1 / math.sqrt(rank), 1 / math.sqrt(rank))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return y + (x @ self.lora_A.to(x.dtype)) @ (self.lora_B / self.rank).to(x.dtype)


class Ssf(nn.Module):
    """y ⊙ γ + β, no identity at the start: γ ~ N(1, 0.02²), β ~ N(0, 0.02²) (Lian et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width).normal_(1.0, 0.02))
        self.shift = nn.Parameter(torch.empty(width).normal_(0.0, 0.02))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift.to(y.dtype), y, self.scale.to(y.dtype))


class Mask(nn.Module):
    """A random share of a layer's scalars trains (arbitrary lightweight fine-tuning, Shi et al. 2024).

    Positions count the layer as LIFT does, as an out × (in + 1) matrix with the bias as last column. They are part of
    the checkpoint, so that a trained model does not hang on a random generator.

    Args:
        layer: what the trained values start from.
        share: above 0 and up to 1.
        draw: gives one permutation.
    """

    positions: Tensor

    def __init__(self, layer: nn.Linear, share: float, draw: torch.Generator) -> None:
        super().__init__()
        columns = [layer.weight] if layer.bias is None else [layer.weight, layer.bias.unsqueeze(1)]
        matrix = torch.cat(columns, dim=1).detach()  # [out, in + 1]
        count = int(matrix.numel() * share)
        if matrix.is_meta:
            positions = torch.empty(count, dtype=torch.int32, device="meta")
        else:
            drawn = torch.randperm(matrix.numel(), generator=draw, device="cpu")[:count]
            positions = drawn.sort().values.int().to(matrix.device)
        self.register_buffer("positions", positions)
        self.values = nn.Parameter(matrix.flatten()[positions.long()])

    def forward(self, y: tuple[Tensor, Tensor | None], x: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, bias = y
        size, width, positions = weight.numel(), weight.shape[1], self.positions.long()
        columns = width if bias is None else width + 1
        row, column = positions // columns, positions % columns
        # One flat copy, weight before bias, so that both are contiguous for the matrix product.
        flat = torch.cat([weight.flatten()] if bias is None else [weight.flatten(), bias])
        place = torch.where(column < width, row * width + column, size + row)
        flat.scatter_(0, place, self.values.to(flat.dtype))
        return flat[:size].view_as(weight), None if bias is None else flat[size:]


class Prompts(nn.Module):
    """Prompt tokens appended behind the patches, in place of the previous block's (Jia et al. 2022, VPT)."""

    def __init__(self, length: int, width: int, patch_size: int) -> None:
        super().__init__()
        bound = math.sqrt(6 / (3 * patch_size * patch_size + width))
        self.prompt = nn.Parameter(torch.empty(length, width).uniform_(-bound, bound))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return torch.cat([y, self.prompt.to(y.dtype).expand(y.shape[0], -1, -1)], dim=1)
