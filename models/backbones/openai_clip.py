"""CLIPs of OpenAI's design, made from a state dict: the image encoder in timm's layout, and the text encoder.

The text encoder has open_clip's names and operations. It is written here so that the embedded miniature CLIP starts
without the seconds that the import of open_clip takes.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tailtune.models.backbones.plain_vit import PlainViT, QuickGELU, VitShape
from tailtune.models.backbones.vit_encoder import ViTEncoder

VISUAL = "visual."
"""Prefix of the names of the image encoder's tensors."""


def meta_image_encoder(config: dict[str, Any], resolution: int, project: bool, fast: bool) -> ViTEncoder:
    """The image encoder on the meta device: shapes only.

    Args:
        config: open_clip's config of the whole model.
        resolution: side of the images, in pixels.
        project: whether it keeps its projection to the shared space.
        fast: False computes the plain formulation.
    """
    projection = torch.empty(config["embed_dim"], config["vision_cfg"]["width"]) if project else None
    return ViTEncoder(PlainViT(VitShape.of(config, resolution)), projection, fast)


def image_encoder(
    state: Mapping[str, Tensor], config: dict[str, Any], resolution: int, project: bool, fast: bool
) -> tuple[ViTEncoder, Tensor]:
    """The image encoder with its weights.

    Args:
        state: state dict of the whole model, under open_clip's names.
        config, resolution, project, fast: as in `meta_image_encoder`.

    Returns:
        The encoder, and the projection [d, D] to the shared space.
    """
    visual = {name.removeprefix(VISUAL): tensor for name, tensor in state.items() if name.startswith(VISUAL)}
    projection = visual.pop("proj").T.contiguous()
    net = PlainViT(VitShape.of(config, resolution))
    net.load_openai_layout(visual)
    return ViTEncoder(net, projection if project else None, fast), projection


class TextModel(nn.Module):
    """CLIP's text encoder. Its weights lie on the meta device until a state dict is assigned.

    Args:
        config: open_clip's config of the whole model.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        text, activation = config["text_cfg"], QuickGELU if config.get("quick_gelu") else nn.GELU
        length, width = text["context_length"], text["width"]
        with torch.device("meta"):
            self.positional_embedding = nn.Parameter(torch.empty(length, width))
            self.text_projection = nn.Parameter(torch.empty(width, config["embed_dim"]))
            self.logit_scale = nn.Parameter(torch.empty(()))
            self.transformer = _TextBlocks(width, text["heads"], text["layers"], activation)
            self.token_embedding = nn.Embedding(text["vocab_size"], width)
            self.ln_final = nn.LayerNorm(width)
        self.register_buffer("causal_mask", torch.full((length, length), -torch.inf).triu(1), persistent=False)

    @classmethod
    def of(cls, state: Mapping[str, Tensor], config: dict[str, Any]) -> "TextModel":
        """The text encoder with its weights.

        Args:
            state: state dict of the whole model, under open_clip's names.
            config: open_clip's config of the whole model.
        """
        model = cls(config)
        model.load_state_dict({name: t for name, t in state.items() if not name.startswith(VISUAL)}, assign=True)
        return model

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Features of sentences in the shared space.

        Args:
            tokens: token ids [n, length]. The end of a text has the largest id.

        Returns:
            Features [n, d], not normalised.
        """
        x = self.token_embedding(tokens) + self.positional_embedding  # [n, length, width]
        x = self.ln_final(self.transformer(x, self.causal_mask))
        return x[torch.arange(len(x), device=x.device), tokens.argmax(-1)] @ self.text_projection


class _TextBlocks(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_TextBlock(width, heads, activation()) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class _TextBlock(nn.Module):
    def __init__(self, width: int, heads: int, activation: nn.Module) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", activation), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[n, length, width] → the same shape; `mask` [length, length] is added to the attention's logits."""
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))
