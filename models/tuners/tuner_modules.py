"""The modules that tuners insert at the sites of a ViT's block.

Each is called as `module(y, x)`, with the site's output y and its input x, and returns the changed output. Parameters
keep their own dtype and are cast to that of y where they are used. Checkpoints contain the names of the parameters.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BottleneckAdapter(nn.Module):
    """W_up ReLU(W_down LN(x) + b_down) + b_up, D → r → D. It starts as zero, because W_up and b_up do.

    Args:
        width: width D of the transformer.
        dim: width r of the bottleneck.
        uniform: whether W_down starts from U(-1/√D, 1/√D), as in LIFT+; else from N(0, 1/(3D)), as in LIFT.
    """

    def __init__(self, width: int, dim: int, uniform: bool = False) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.down_proj = nn.Linear(width, dim)
        self.up_proj = nn.Linear(dim, width)
        draw = nn.init.kaiming_uniform_ if uniform else nn.init.kaiming_normal_
        draw(self.down_proj.weight, a=math.sqrt(5))
        nn.init.zeros_(self.down_proj.bias)
        nn.init.zeros_(self.up_proj.weight)
        nn.init.zeros_(self.up_proj.bias)

    def bottleneck(self, x: Tensor, dtype: torch.dtype, scale: Tensor | float | None = None) -> Tensor:
        """The output of the bottleneck.

        Args:
            x: [B, N, D].
            dtype: dtype of the output.
            scale: factor of the output. It multiplies the small weight W_up instead, because the backward pass would
                need a copy of the large output.

        Returns:
            [B, N, D].
        """
        ln, down, up = self.ln, self.down_proj, self.up_proj
        normed = F.layer_norm(x, ln.normalized_shape, ln.weight.to(x.dtype), ln.bias.to(x.dtype), ln.eps).to(dtype)
        hidden = F.relu(F.linear(normed, down.weight.to(dtype), down.bias.to(dtype)))
        weight, bias = (up.weight, up.bias) if scale is None else (up.weight * scale, up.bias * scale)
        return F.linear(hidden, weight.to(dtype), bias.to(dtype))


class Adapter(BottleneckAdapter):
    """Sequential adapter after the MLP: y + A(y). Source: Houlsby et al. 2019, in LIFT's form."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Output of the MLP y and its input x, [B, N, D] → [B, N, D]."""
        return y + self.bottleneck(y, y.dtype)


class AdaptFormer(BottleneckAdapter):
    """Adapter in parallel to the MLP: y + s · A(x). Source: Chen et al. 2022.

    Args:
        width: width D of the transformer.
        dim: width r of the bottleneck.
        scale: the factor s; None: s is learnt and starts from 1.
        uniform: as for `BottleneckAdapter`.
    """

    def __init__(self, width: int, dim: int, scale: float | None = None, uniform: bool = False) -> None:
        super().__init__(width, dim, uniform)
        self.scale: nn.Parameter | float = nn.Parameter(torch.ones(1)) if scale is None else scale

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Output of the MLP y and the residual stream before norm2 x, [B, N, D] → [B, N, D]."""
        return y + self.bottleneck(x, y.dtype, self.scale)


class Lora(nn.Module):
    """Low-rank update of a linear layer: y + (1 / r) · (x A) B. Source: Hu et al. 2022.

    As in LIFT, A is drawn with fan-in r, that is from U(-1/√r, 1/√r); B starts as zero.

    Args:
        dim_in: input width of the layer.
        dim_out: output width of the layer.
        rank: the rank r.
    """

    def __init__(self, dim_in: int, dim_out: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.lora_A = nn.Parameter(torch.empty(dim_in, rank))
        self.lora_B = nn.Parameter(torch.zeros(rank, dim_out))
        nn.init.uniform_(self.lora_A, -1 / math.sqrt(rank), 1 / math.sqrt(rank))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Output y [B, N, dim_out] and input x [B, N, dim_in] of the layer → [B, N, dim_out]."""
        return y + (x @ self.lora_A.to(x.dtype)) @ (self.lora_B / self.rank).to(x.dtype)


class Ssf(nn.Module):
    """Scale and shift: y ⊙ γ + β. Source: Lian et al. 2022.

    It changes the output from the start: γ ~ N(1, 0.02²), β ~ N(0, 0.02²).

    Args:
        width: number of channels of the output.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width).normal_(1.0, 0.02))
        self.shift = nn.Parameter(torch.empty(width).normal_(0.0, 0.02))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Output y [..., width] → [..., width]; x is not used."""
        return torch.addcmul(self.shift.to(y.dtype), y, self.scale.to(y.dtype))


class ChosenWeights(nn.Module):
    """Some of a linear layer's weights and biases train.

    Which these are is part of the checkpoint, so a trained model does not depend on a random generator.

    Args:
        positions: of the values that train, int32 [n], as the derived class counts them.
        values: their first values [n].
    """

    positions: Tensor

    def __init__(self, positions: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("positions", positions)
        self.values = nn.Parameter(values)

    def places(self, width: int, size: int, has_bias: bool) -> Tensor:
        """The positions, counted through the flat weight and then the bias, int64 [n].

        Args:
            width: input width of the layer.
            size: number of its weights.
            has_bias: whether it has a bias.
        """
        return self.positions.long()

    def forward(self, y: tuple[Tensor, Tensor | None], x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Put the trained values into the layer's weight and bias.

        Args:
            y: weight [out, in] and bias [out] or None.
            x: not used.

        Returns:
            A changed copy of the two.
        """
        weight, bias = y
        size = weight.numel()
        # One flat copy with the weight before the bias, so that both stay contiguous for the matrix product.
        flat = torch.cat([weight.flatten()] if bias is None else [weight.flatten(), bias])
        flat.scatter_(0, self.places(weight.shape[1], size, bias is not None), self.values.to(flat.dtype))
        return flat[:size].view_as(weight), None if bias is None else flat[size:]


class Mask(ChosenWeights):
    """A random share of a linear layer's weights and biases trains. Source: Shi et al. 2024 (arbitrary lightweight
    fine-tuning).

    Positions are counted as in LIFT: the layer is an out × (in + 1) matrix whose last column is the bias.

    Args:
        layer: the layer; the trained values start from its own.
        share: share of the values that train, above 0 and up to 1.
        draw: the random generator; it draws one permutation.
    """

    def __init__(self, layer: nn.Linear, share: float, draw: torch.Generator) -> None:
        columns = [layer.weight] if layer.bias is None else [layer.weight, layer.bias.unsqueeze(1)]
        matrix = torch.cat(columns, dim=1).detach()  # [out, in + 1]
        count = int(matrix.numel() * share)
        if matrix.is_meta:
            positions = torch.empty(count, dtype=torch.int32, device="meta")
        else:
            drawn = torch.randperm(matrix.numel(), generator=draw, device="cpu")[:count]
            positions = drawn.sort().values.int().to(matrix.device)
        super().__init__(positions, matrix.flatten()[positions.long()])

    def places(self, width: int, size: int, has_bias: bool) -> Tensor:
        positions = self.positions.long()
        columns = width + 1 if has_bias else width
        row, column = positions // columns, positions % columns
        return torch.where(column < width, row * width + column, size + row)


class TensorMasks(ChosenWeights):
    """As `Mask`, in the form of LIFT+: a share of the weights and a share of the biases, each drawn for itself.

    Every draw begins with the same seed, so tensors of one size train at the same positions in all blocks. Positions
    count through the weight and then the bias.

    Args:
        layer: the layer; the trained values start from its own.
        share: share of the values of each tensor that train, above 0 and up to 1.
        seed: random seed of each draw.
    """

    def __init__(self, layer: nn.Linear, share: float, seed: int) -> None:
        tensors = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        parts, start = [], 0
        for tensor in tensors:
            parts.append(start + self._drawn(tensor, share, seed))
            start += tensor.numel()
        positions = torch.cat(parts).int()
        super().__init__(positions, torch.cat([tensor.detach().flatten() for tensor in tensors])[positions.long()])

    @staticmethod
    def _drawn(tensor: Tensor, share: float, seed: int) -> Tensor:
        """Positions in a flat tensor in ascending order, int64 [n], on its device."""
        count = int(tensor.numel() * share)
        if tensor.is_meta:
            return torch.empty(count, dtype=torch.int64, device="meta")
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(tensor.numel(), generator=generator, device="cpu")[:count]
        return drawn.sort().values.to(tensor.device)


class Prompts(nn.Module):
    """Prompt tokens, appended after the patches; they replace those of the block before. Source: VPT, Jia et al. 2022.

    Args:
        length: number of prompt tokens P.
        width: width D of the transformer.
        patch_size: side of a patch in pixels, which the range of the uniform initial values depends on; None: they are
            drawn from N(0, 0.02²), as in LIFT+.
    """

    def __init__(self, length: int, width: int, patch_size: int | None) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.empty(length, width))
        if patch_size is None:
            nn.init.normal_(self.prompt, std=0.02)
        else:
            bound = math.sqrt(6 / (3 * patch_size * patch_size + width))
            nn.init.uniform_(self.prompt, -bound, bound)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Tokens of the image y [B, N, D] → [B, N + P, D]; x is not used."""
        return torch.cat([y, self.prompt.to(y.dtype).expand(y.shape[0], -1, -1)], dim=1)
