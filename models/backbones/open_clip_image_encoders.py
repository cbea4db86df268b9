"""open_clip's image encoders as ours: OpenAI's ViTs move into timm's layout, all others run as they are."""

from functools import partial
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPVisionCfg
from open_clip.timm_model import TimmModel
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.timm_backbone import set_resolution
from tailtune.models.backbones.vit_compatibility import unsupported_part
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.models.backbones.whole_network_encoder import WholeNetworkEncoder

NORM_EPS = 1e-5
OPENAI_VIT_SETTINGS = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
"""Settings of OpenAI's ViTs. An image encoder with other settings has parts that timm's `VisionTransformer` lacks."""


def is_openai_vit(config: dict[str, Any]) -> bool:
    """Whether the image encoder of open_clip's config is a ViT of OpenAI's kind, which timm's layout can hold."""
    vision = config["vision_cfg"]
    return vision.keys() <= OPENAI_VIT_SETTINGS and isinstance(vision["layers"], int)


def empty_timm_vit(config: dict[str, Any], resolution: int) -> VisionTransformer:
    """A timm ViT of the shape that open_clip's config describes; its weights are yet to be loaded.

    Args:
        config: open_clip's config of the whole model.
        resolution: side of the images, in pixels.
    """
    vision = CLIPVisionCfg(**config["vision_cfg"])
    return VisionTransformer(
        img_size=resolution,
        patch_size=vision.patch_size,
        embed_dim=vision.width,
        depth=vision.layers,
        num_heads=vision.width // vision.head_width,
        mlp_ratio=vision.mlp_ratio,
        pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=NORM_EPS),
        act_layer="quick_gelu" if config.get("quick_gelu") else "gelu",
        num_classes=0,
    )


def vision_config(config: dict[str, Any], resolution: int) -> dict[str, Any]:
    """The settings with which open_clip builds its image encoder.

    Args:
        config: open_clip's config of the whole model.
        resolution: side of the images, in pixels. ViTs of OpenAI's kind keep their own: they get this one as they
            move into timm's layout.
    """
    vision = config["vision_cfg"]
    return vision if is_openai_vit(config) else {**vision, "image_size": resolution}


def meta_image_encoder(config: dict[str, Any], resolution: int, project: bool, fast: bool) -> Encoder:
    """The image encoder on the meta device: shapes only.

    No text encoder is built, because some are described on the Hugging Face hub only.

    Args:
        config: open_clip's config of the whole model.
        resolution: side of the images, in pixels.
        project: whether a ViT keeps its projection to the shared space.
        fast: False computes the plain formulation of a ViT.
    """
    embed_dim, vision = config["embed_dim"], vision_config(config, resolution)
    if is_openai_vit(config):
        projection = torch.empty(embed_dim, vision["width"]) if project else None
        return ViTEncoder(empty_timm_vit(config, resolution), projection, fast)
    visual = open_clip.CLIP(embed_dim, vision, {"layers": 1}, bool(config.get("quick_gelu"))).visual
    return _embedding_encoder(visual, embed_dim, resolution, fast)


def extract_image_encoder(
    clip: Any, config: dict[str, Any], resolution: int, project: bool, fast: bool
) -> tuple[Encoder, Tensor | None]:
    """Take the image encoder out of one of open_clip's models.

    Args:
        clip: the model, with its weights loaded.
        config: open_clip's config of it.
        resolution: side of the images, in pixels.
        project: whether a ViT keeps its projection to the shared space.
        fast: False computes the plain formulation of a ViT.

    Returns:
        The encoder, and the projection [d, D] to the shared space; None where the encoder always projects.
    """
    if not is_openai_vit(config):
        return _embedding_encoder(clip.visual, config["embed_dim"], resolution, fast), None
    state = clip.state_dict()
    net = empty_timm_vit(config, resolution)
    filtered = checkpoint_filter_fn(dict(state), net)
    projection = state["visual.proj"].T.contiguous()
    del filtered["head.weight"], filtered["head.bias"]
    net.load_state_dict(filtered)
    return ViTEncoder(net, projection if project else None, fast), projection


def _embedding_encoder(visual: Any, embed_dim: int, resolution: int, fast: bool) -> Encoder:
    """An encoder for a network whose output is the embedding; a plain timm ViT leaves open_clip's wrapper."""
    if isinstance(visual, TimmModel):
        trunk: Any = visual.trunk
        set_resolution(trunk, resolution, trunk.pretrained_cfg["input_size"][-1], trunk.pretrained_cfg["architecture"])
        if unsupported_part(trunk) is None and isinstance(trunk.head, nn.Identity) and not len(visual.head):
            return ViTEncoder(trunk, fast=fast)
    if hasattr(visual, "output_tokens"):
        visual.output_tokens = False  # CoCa gives tokens as well, for captions
    return WholeNetworkEncoder(visual, embed_dim)
