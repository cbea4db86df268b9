"""The ViT of OpenAI's CLIPs, in timm's layout. It only holds weights; `ViTEncoder` computes with them.

timm's own class would do, too. But timm takes longer to import than a small run takes to its first step, and it draws
random weights, which the pre-trained ones then replace.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NORM_EPS = 1e-5
OPENAI_VIT_DEFAULTS = {
    **{"image_size": 224, "patch_size": 16, "width": 768, "layers": 12},
    **{"head_width": 64, "mlp_ratio": 4.0},
}
"""Settings of OpenAI's ViTs, with open_clip's defaults. An image encoder with other settings has other parts."""
TIMM_NAMES = (
    ("conv1", "patch_embed.proj"),
    ("class_embedding", "cls_token"),
    ("positional_embedding", "pos_embed"),
    ("transformer.resblocks.", "blocks."),
    ("ln_pre", "norm_pre"),
    ("ln_post", "norm"),
    ("ln_", "norm"),
    ("in_proj_", "qkv."),
    ("out_proj", "proj"),
    ("c_fc", "fc1"),
    ("c_proj", "fc2"),
)
"""Part of a name in OpenAI's layout → its replacement in timm's layout, in the order in which they are replaced."""


@dataclass(frozen=True)
class VitShape:
    """The shape of one of OpenAI's ViTs."""

    resolution: int
    """Side of the images, in pixels."""
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float
    quick_gelu: bool

    @classmethod
    def of(cls, config: dict[str, Any], resolution: int) -> "VitShape":
        """Read the shape from open_clip's config of a model.

        Args:
            config: the config of the whole model.
            resolution: side of the images, in pixels.
        """
        vision = {**OPENAI_VIT_DEFAULTS, **config["vision_cfg"]}
        width, heads = vision["width"], vision["width"] // vision["head_width"]
        quick_gelu = bool(config.get("quick_gelu"))
        return cls(resolution, vision["patch_size"], width, vision["layers"], heads, vision["mlp_ratio"], quick_gelu)


def is_openai_vit(config: dict[str, Any]) -> bool:
    """Whether the image encoder of open_clip's config is a ViT of OpenAI's kind."""
    vision = config["vision_cfg"]
    return vision.keys() <= OPENAI_VIT_DEFAULTS.keys() and isinstance(vision["layers"], int)


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the activation of OpenAI's CLIPs."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def is_quick_gelu(activation: nn.Module) -> bool:
    """Whether a module is a QuickGELU: ours, timm's or open_clip's. The classes have the same name."""
    return type(activation).__name__ == "QuickGELU"


class PatchEmbed(nn.Module):
    """One linear map of every patch."""

    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        side = shape.resolution // shape.patch_size
        self.img_size = (shape.resolution, shape.resolution)
        self.patch_size = (shape.patch_size, shape.patch_size)
        self.grid_size = (side, side)
        self.num_patches = side * side
        self.proj = nn.Conv2d(3, shape.width, shape.patch_size, shape.patch_size, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] → tokens [B, N, D]."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """The weights of self-attention; q, k and v are packed."""

    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        self.num_heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        self.proj = nn.Linear(shape.width, shape.width)


class Mlp(nn.Module):
    """The weights of the MLP of a block."""

    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        hidden = int(shape.width * shape.mlp_ratio)
        self.fc1 = nn.Linear(shape.width, hidden)
        self.act = QuickGELU() if shape.quick_gelu else nn.GELU()
        self.fc2 = nn.Linear(hidden, shape.width)


class Block(nn.Module):
    """The weights of a pre-norm block."""

    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, NORM_EPS)
        self.attn = Attention(shape)
        self.ls1 = nn.Identity()
        self.norm2 = nn.LayerNorm(shape.width, NORM_EPS)
        self.mlp = Mlp(shape)
        self.ls2 = nn.Identity()


class PlainViT(nn.Module):
    """The weights of the network, under timm's names; on the meta device until `load_openai_layout` is called.

    Args:
        shape: sizes of the network.
    """

    num_prefix_tokens = 1
    """The class token."""
    global_pool = "token"
    """The feature is the class token."""

    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        self.embed_dim = shape.width
        with torch.device("meta"):  # no random weights are drawn
            self.patch_embed = PatchEmbed(shape)
            self.cls_token = nn.Parameter(torch.empty(1, 1, shape.width))
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.patch_embed.num_patches, shape.width))
            self.norm_pre = nn.LayerNorm(shape.width, NORM_EPS)
            self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
            self.norm = nn.LayerNorm(shape.width, NORM_EPS)
            self.fc_norm = nn.Identity()

    def add_positions(self, x: Tensor) -> Tensor:
        """Patch tokens [B, N, D] → class token and patch tokens with their positions [B, 1 + N, D]."""
        class_token = self.cls_token.expand(x.shape[0], -1, -1)  # `len(x)` would be a constant in an ONNX graph
        return torch.cat([class_token, x], dim=1) + self.pos_embed

    def pool(self, x: Tensor) -> Tensor:
        """The class token of [B, N, D], [B, D]."""
        return x[:, 0]

    def load_openai_layout(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights from a state dict in OpenAI's layout, without a copy. A smaller or larger grid is resized.

        Args:
            state: name → tensor of the image encoder, without the prefix `visual.` and without `proj`.
        """
        renamed = {timm_name(name): tensor for name, tensor in state.items()}
        renamed["cls_token"] = renamed["cls_token"].reshape(1, 1, -1)
        positions = renamed["pos_embed"][None]
        if positions.shape != self.pos_embed.shape:
            from timm.layers import resample_abs_pos_embed  # takes seconds to import

            positions = resample_abs_pos_embed(positions, list(self.patch_embed.grid_size))
        self.load_state_dict({**renamed, "pos_embed": positions}, assign=True)


def timm_name(name: str) -> str:
    """Convert the name of a tensor from OpenAI's layout to timm's layout."""
    for part, replacement in TIMM_NAMES:
        name = name.replace(part, replacement)
    return name
