"""open_clip's image towers in our hosts: ViTs of OpenAI's kind in timm's layout, the others as they are."""

from functools import partial
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPVisionCfg
from open_clip.timm_model import TimmModel
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.timm_backbone import resize
from tailtune.models.backbones.vit_compatibility import refusal
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.models.backbones.whole_network_encoder import WholeNetworkEncoder

TOWER_NORM_EPS = 1e-5
SIMPLE = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
"""The settings of OpenAI's ViTs. A tower with further ones has parts that timm's `VisionTransformer` has not."""


def image_tower(config: dict[str, Any], resolution: int) -> VisionTransformer:
    """An empty timm ViT of the shape of open_clip's config."""
    vision = CLIPVisionCfg(**config["vision_cfg"])
    return VisionTransformer(
        img_size=resolution,
        patch_size=vision.patch_size,
        embed_dim=vision.width,
        depth=vision.layers,
        num_heads=vision.width // vision.head_width,
        mlp_ratio=vision.mlp_ratio,
        pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=TOWER_NORM_EPS),
        act_layer="quick_gelu" if config.get("quick_gelu") else "gelu",
        num_classes=0,
    )


def is_simple(config: dict[str, Any]) -> bool:
    """Whether the tower is a ViT that moves into our layout, its projection apart."""
    vision = config["vision_cfg"]
    return vision.keys() <= SIMPLE and isinstance(vision["layers"], int)


def vision_at(config: dict[str, Any], resolution: int) -> dict[str, Any]:
    """The settings of the image tower for images of a size. Those that move into our layout get it there."""
    vision = config["vision_cfg"]
    return vision if is_simple(config) else {**vision, "image_size": resolution}


def empty_tower(config: dict[str, Any], resolution: int, project: bool, fast: bool) -> Encoder:
    """The image tower on the meta device, without a text tower, which may be described on a hub only."""
    dim, vision = config["embed_dim"], vision_at(config, resolution)
    if is_simple(config):
        projection = torch.empty(dim, vision["width"]) if project else None
        return ViTEncoder(image_tower(config, resolution), projection, fast)
    tower = open_clip.CLIP(dim, vision, {"layers": 1}, bool(config.get("quick_gelu"))).visual
    return _whole(tower, dim, resolution, fast)


def taken_tower(
    clip: Any, config: dict[str, Any], resolution: int, project: bool, fast: bool
) -> tuple[Encoder, Tensor | None]:
    """The image tower of a loaded model in a host, and the projection [d, D] where that is a part of its own."""
    if not is_simple(config):
        return _whole(clip.visual, config["embed_dim"], resolution, fast), None
    state = clip.state_dict()
    net = image_tower(config, resolution)
    filtered = checkpoint_filter_fn(dict(state), net)
    projection = state["visual.proj"].T.contiguous()
    del filtered["head.weight"], filtered["head.bias"]
    net.load_state_dict(filtered)
    return ViTEncoder(net, projection if project else None, fast), projection


def _whole(tower: Any, dim: int, resolution: int, fast: bool) -> Encoder:
    """A tower whose output is the embedding; a timm ViT that ends in it is taken out of open_clip's wrapper."""
    if isinstance(tower, TimmModel):
        trunk: Any = tower.trunk
        resize(trunk, resolution, trunk.pretrained_cfg["input_size"][-1], trunk.pretrained_cfg["architecture"])
        if refusal(trunk) is None and isinstance(trunk.head, nn.Identity) and not len(tower.head):
            return ViTEncoder(trunk, fast=fast)
    if hasattr(tower, "output_tokens"):
        tower.output_tokens = False  # CoCa's captions need them
    return WholeNetworkEncoder(tower, dim)
