"""The text encoder of OpenAI's CLIPs, in timm's layout. It only holds weights; `TextTower` computes with them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tailtune.models.backbones.plain_vit import NORM_EPS, Block, VitShape

OPENAI_TEXT = {"context_length", "vocab_size", "width", "heads", "layers"}
"""Settings of OpenAI's text encoders in open_clip's configs. One with other settings has other parts."""


def is_openai_text(config: Mapping[str, Any]) -> bool:
    """Whether the text encoder of open_clip's config of a model is of OpenAI's kind."""
    return set(config["text_cfg"]) == OPENAI_TEXT and not config.get("custom_text") and "multimodal_cfg" not in config


class PlainText(nn.Module):
    """The weights of OpenAI's text encoder, under timm's names; on the meta device until they are loaded.

    Args:
        config: open_clip's config of the whole model.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        text = config["text_cfg"]
        width = text["width"]
        shape = VitShape(0, 1, width, text["layers"], text["heads"], 4.0, bool(config.get("quick_gelu")))
        with torch.device("meta"):
            self.token_embedding = nn.Embedding(text["vocab_size"], width)
            self.pos_embed = nn.Parameter(torch.empty(text["context_length"], width))
            self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
            self.norm = nn.LayerNorm(width, NORM_EPS)
