"""Backbones with a text tower: open_clip resolves and reads the weights, the image tower moves into the ViT host."""

import json
import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from configs.errors import UserError, lookup, unknown
from configs.seeding import seeded
from models.backbone import Backbone, Inputs, Stats
from models.text import TextTower
from models.vit import ViT
from models.weights import fetch, is_path, load_strict, local_file, read_state

TOWER_NORM_EPS = 1e-5

log = logging.getLogger("tailtune")


@dataclass(frozen=True)
class Clip:
    """A CLIP whose image tower is a ViT.

    Args:
        arch: open_clip's model name; with OpenAI's weights one of the `-quickgelu` names.
        tag: what `pretrained default` means.
        config: model config file of an architecture that open_clip does not know.
        files: tag → file, for weights that travel with the repository.
    """

    arch: str
    tag: str = "openai"
    config: Path | None = None
    files: dict[str, Path] = field(default_factory=dict)
    stats: Stats = (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)

    def inputs(self) -> Inputs:
        vision = self._config()["vision_cfg"]
        return Inputs(vision["image_size"], patch_size=vision["patch_size"])

    def build(self, pretrained: str | None, resolution: int, seed: int, project: bool, fast: bool = True) -> Backbone:
        """The image tower in the host, with the text tower at hand.

        On the meta device nothing is read. `project` keeps the visual projection (zero-shot).

        Raises:
            UserError: unknown tag, no such file, no network, a file of another model, QuickGELU mismatch.
        """
        config = self._config()
        dim = config["embed_dim"]
        if torch.get_default_device().type == "meta":
            projection = torch.empty(dim, config["vision_cfg"]["width"]) if project else None
            return Backbone(ViT(image_tower(config, resolution), projection, fast), self.stats, embed_dim=dim)
        path = self._resolve(pretrained, config)
        with seeded(seed, "backbone"):
            clip: Any = open_clip.CLIP(**config)
        if path is not None:
            load_strict(clip, read_state(path), self.arch, path)
        state = clip.state_dict()
        net = image_tower(config, resolution)
        filtered = checkpoint_filter_fn(dict(state), net)
        projection = state["visual.proj"].T.contiguous()  # [d, D]
        del filtered["head.weight"], filtered["head.bias"]
        net.load_state_dict(filtered)
        del clip.visual
        host = ViT(net, projection if project else None, fast)
        text = TextTower(clip, open_clip.get_tokenizer(self.arch), None if project else projection)
        return Backbone(host, self.stats, dim, text, random=path is None)

    def _config(self) -> dict[str, Any]:
        if self.config is not None:
            open_clip.add_model_config(self.config)
            return json.loads(self.config.read_text())
        return open_clip.get_model_config(self.arch)

    def _resolve(self, pretrained: str | None, config: dict[str, Any]) -> Path | None:
        """The weights file of an option's value; None for random weights."""
        if pretrained is None:
            return None
        if is_path(pretrained):
            if config.get("quick_gelu"):  # a file does not say
                log.info("%s is taken to have been trained with QuickGELU, as OpenAI's weights", pretrained)
            return local_file(pretrained)
        tag = self.tag if pretrained == "default" else pretrained
        if self.files:
            return lookup(self.files, tag, f"pretrained tag of {self.arch}")
        source = get_pretrained_cfg(self.arch, tag)
        if not source:
            raise unknown(f"pretrained tag of {self.arch}", tag, list_pretrained_tags_by_model(self.arch))
        if source.get("quick_gelu", False) != config.get("quick_gelu", False):
            wanted = "with" if source.get("quick_gelu") else "without"
            raise UserError(
                f"pretrained '{tag}' was trained {wanted} QuickGELU and {self.arch} is not: features would be wrong; "
                "choose a tag of the same activation"
            )
        return fetch(self.arch, tag, source)


def image_tower(config: dict[str, Any], resolution: int) -> VisionTransformer:
    """An empty timm ViT of the shape of open_clip's config."""
    vision = config["vision_cfg"]
    width = vision["width"]
    return VisionTransformer(
        img_size=resolution,
        patch_size=vision["patch_size"],
        embed_dim=width,
        depth=vision["layers"],
        num_heads=width // vision.get("head_width", 64),
        mlp_ratio=vision.get("mlp_ratio", 4.0),
        pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=TOWER_NORM_EPS),
        act_layer="quick_gelu" if config.get("quick_gelu") else "gelu",
        num_classes=0,
    )
