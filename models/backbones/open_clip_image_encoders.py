"""open_clip's image encoders as ours: plain timm ViTs run in `ViTEncoder`, all others run as they are.

ViTs of OpenAI's design are made in `openai_clip.py`.
"""

from typing import Any

from torch import nn

from tailtune.configs.lazy_module import lazy_module
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.plain_vit import is_openai_vit
from tailtune.models.backbones.timm_backbone import set_resolution
from tailtune.models.backbones.vit_compatibility import unsupported_part
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.models.backbones.whole_network_encoder import WholeNetworkEncoder

open_clip = lazy_module("open_clip")


def vision_config(config: dict[str, Any], resolution: int) -> dict[str, Any]:
    """The settings with which open_clip builds its image encoder.

    Args:
        config: open_clip's config of the whole model.
        resolution: side of the images, in pixels. ViTs of OpenAI's kind keep their own: they get this one as they
            move into timm's layout.
    """
    vision = config["vision_cfg"]
    return vision if is_openai_vit(config) else {**vision, "image_size": resolution}


def meta_image_encoder(config: dict[str, Any], resolution: int, fast: bool) -> Encoder:
    """The image encoder on the meta device: shapes only.

    No text encoder is built, because some are described on the Hugging Face hub only.

    Args:
        config: open_clip's config of the whole model.
        resolution: side of the images, in pixels.
        fast: False computes the plain formulation of a ViT.
    """
    embed_dim, vision = config["embed_dim"], vision_config(config, resolution)
    visual = open_clip.CLIP(embed_dim, vision, {"layers": 1}, bool(config.get("quick_gelu"))).visual
    return embedding_encoder(visual, embed_dim, resolution, fast)


def embedding_encoder(visual: Any, embed_dim: int, resolution: int, fast: bool) -> Encoder:
    """An encoder for a network whose output is the embedding; a plain timm ViT leaves open_clip's wrapper.

    Args:
        visual: open_clip's image encoder, with its weights loaded.
        embed_dim: width of the embedding.
        resolution, fast: as in `meta_image_encoder`.
    """
    if isinstance(visual, open_clip.timm_model.TimmModel):
        trunk: Any = visual.trunk
        set_resolution(trunk, resolution, trunk.pretrained_cfg["input_size"][-1], trunk.pretrained_cfg["architecture"])
        if unsupported_part(trunk) is None and isinstance(trunk.head, nn.Identity) and not len(visual.head):
            return ViTEncoder(trunk, fast=fast)
    if hasattr(visual, "output_tokens"):
        visual.output_tokens = False  # CoCa gives tokens as well, for captions
    return WholeNetworkEncoder(visual, embed_dim)
