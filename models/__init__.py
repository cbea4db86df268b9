"""`build_model`: from a config to encoder + tuners + head. Below this file nothing sees the config."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from configs import CfgNode
from configs.errors import UserError, lookup
from configs.seeding import seeded
from models.backbone import Backbone, BackboneSpec
from models.classifier import Classifier
from models.clip import Clip
from models.head_init import HEAD_INITS, NEEDS_TEXT, HeadContext, text_feat
from models.heads import HEADS, CosineClassifier
from models.prompts import PROMPTS
from models.timm_vit import TimmVit
from models.tuners import TUNERS, Sizes, add_tuners, bottleneck_dim

__all__ = ["BACKBONES", "VPT_LEN", "Classifier", "build_model", "resolve"]

TINY = Path(__file__).parent / "tiny_clip"
HALF = (0.5, 0.5, 0.5)
VPT_LEN = 10

HeadInit = Callable[[HeadContext], Tensor]

BACKBONES: dict[str, BackboneSpec] = {
    "CLIP-ViT-B/16": Clip("ViT-B-16-quickgelu"),
    "IN21K-ViT-B/16": TimmVit("vit_base_patch16_224.augreg_in21k_ft_in1k"),
    "TinyCLIP": Clip(
        "tailtune-tiny",
        tag="embedded",
        config=TINY / "tailtune-tiny.json",
        files={"embedded": TINY / "weights.safetensors"},
        stats=(HALF, HALF),
    ),
}


def build_model(cfg: CfgNode, class_names: Sequence[str], fast: bool = True) -> Classifier:
    """The model of a config, ready to train; on the meta device it has shapes only.

    Args:
        cfg: a resolved config.
        class_names: C names.
        fast: False builds the plain formulation of the encoder, for comparison.

    Raises:
        UserError: an unknown name, weights that are not there, or parts that do not fit each other.
    """
    spec = lookup(BACKBONES, cfg.backbone, "backbone")
    patch_size = spec.inputs().patch_size
    lookup(PROMPTS, cfg.prompt, "prompt")
    tuners = [name for name in TUNERS if cfg[name]]
    if patch_size and cfg.resolution % patch_size:  # the rest of the image would be cut off in silence
        raise UserError(
            f"resolution {cfg.resolution} must be a multiple of {patch_size}, the patch size of {cfg.backbone}"
        )
    backbone = spec.build(cfg.pretrained, cfg.resolution, cfg.seed, project=cfg.zero_shot, fast=fast)
    encoder = backbone.encoder
    if cfg.zero_shot and tuners:
        raise UserError(f"zero_shot trains nothing, so {', '.join(tuners)} would be left out; set one of them to False")
    if cfg.zero_shot:
        assert backbone.embed_dim is not None  # else `project` would have been refused
        scale = backbone.text.logit_scale if backbone.text else 1.0
        head: nn.Module = CosineClassifier(backbone.embed_dim, len(class_names), scale).requires_grad_(False)
        init: HeadInit | None = partial(text_feat, text=backbone.text, prompt=cfg.prompt)
    else:
        sizes = Sizes(cfg.adapter_dim or bottleneck_dim(len(class_names), encoder.depth), cfg.vpt_len or VPT_LEN)
        add_tuners(encoder, tuners, sizes, cfg.partial, cfg.seed)
        with seeded(cfg.seed, "head"):
            head = lookup(HEADS, cfg.classifier, "classifier")(encoder.feature_dim, len(class_names), cfg.scale)
        init = _head_init(cfg, backbone)
    encoder.set_precision()
    return Classifier(encoder, head, backbone.stats, init, backbone.random)


def resolve(cfg: CfgNode) -> CfgNode:
    """The config with what it leaves to the backbone filled in: resolution, interpolation, expand."""
    inputs = lookup(BACKBONES, cfg.backbone, "backbone").inputs()
    cfg = cfg.clone()
    cfg.defrost()
    for key in ("resolution", "interpolation", "expand"):
        if cfg[key] is None:
            cfg[key] = getattr(inputs, key)
    cfg.freeze()
    return cfg


def _head_init(cfg: CfgNode, backbone: Backbone) -> HeadInit | None:
    if cfg.init_head is None:
        return None
    init: Any = lookup(HEAD_INITS, cfg.init_head, "init_head")
    if cfg.init_head in NEEDS_TEXT and backbone.embed_dim is None:
        raise UserError(f"init_head {cfg.init_head} needs a text tower, and {cfg.backbone} has none; try class_mean")
    return partial(init, text=backbone.text, prompt=cfg.prompt)
