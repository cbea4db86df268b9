"""`build_model`: from a config to encoder + tuners + head. Below this file nothing sees the config."""

from collections.abc import Callable, Sequence
from pathlib import Path

import open_clip
import timm
from torch import nn

from configs import CfgNode
from configs.errors import UserError, lookup, naming, unknown
from configs.seeding import seeded
from models.backbone import Backbone, BackboneSpec, Split, Stats
from models.classifier import Classifier
from models.clip import Clip, find_clip
from models.experts import ExpertHeads
from models.head_init import HEAD_INITS, NEEDS_TEXT, HeadInit
from models.heads import HEADS, CosineClassifier
from models.host import Host
from models.peft_adapter import Peft
from models.peft_backend import add_peft
from models.plain import Plain
from models.prompts import DESCRIPTOR, Sentences, fill
from models.resnet import Design
from models.resnet_backbone import ResNets
from models.timm_models import Timm, find_timm
from models.tuners import TUNERS, Sizes, add_tuners, bottleneck_dim, mask_ratio

__all__ = ["BACKBONES", "Classifier", "build_model", "find_backbone", "resolve", "sizes_of"]

TINY = Path(__file__).parent / "tiny_clip"
HALF = (0.5, 0.5, 0.5)
VPT_LEN = 10

BACKBONES: dict[str, BackboneSpec] = {
    "CLIP-RN50": Clip("RN50-quickgelu"),
    "CLIP-RN101": Clip("RN101-quickgelu"),
    "CLIP-ViT-B/16": Clip("ViT-B-16-quickgelu"),
    "CLIP-ViT-B/32": Clip("ViT-B-32-quickgelu"),
    "CLIP-ViT-L/14": Clip("ViT-L-14-quickgelu"),
    "CLIP-ViT-L/14@336px": Clip("ViT-L-14-336-quickgelu"),
    # LIFT's names. The weights were fine-tuned on ImageNet-1k after ImageNet-21k, so they have seen ImageNet-LT's
    # labels; `timm:vit_base_patch16_224.augreg_in21k` has not.
    "IN21K-ViT-B/16": Timm("vit_base_patch16_224.augreg_in21k_ft_in1k", interpolation="bilinear"),
    "IN21K-ViT-B/16@384px": Timm("vit_base_patch16_384.augreg_in21k_ft_in1k", interpolation="bilinear"),
    "IN21K-ViT-L/16": Timm("vit_large_patch16_224.augreg_in21k_ft_in1k", interpolation="bilinear"),
    "ResNet-20": ResNets("ResNet-20", Design((3, 3, 3), cifar=True)),
    "ResNet-32": ResNets("ResNet-32", Design((5, 5, 5), cifar=True)),
    "ResNet-44": ResNets("ResNet-44", Design((7, 7, 7), cifar=True)),
    "ResNet-56": ResNets("ResNet-56", Design((9, 9, 9), cifar=True)),
    # With `pretrained default` these, too, have seen ImageNet-LT's labels.
    "ResNet-10": ResNets("ResNet-10", Design((1, 1, 1, 1))),
    "ResNet-50": ResNets("ResNet-50", Design((3, 4, 6, 3), bottleneck=True), "resnet50.a1_in1k"),
    "ResNet-101": ResNets("ResNet-101", Design((3, 4, 23, 3), bottleneck=True), "resnet101.a1_in1k"),
    "ResNet-152": ResNets("ResNet-152", Design((3, 8, 36, 3), bottleneck=True), "resnet152.a1_in1k"),
    "ResNeXt-50": ResNets(
        "ResNeXt-50", Design((3, 4, 6, 3), bottleneck=True, groups=32, group_width=4), "resnext50_32x4d.a1_in1k"
    ),
    "TinyCLIP": Clip(
        "tailtune-tiny",
        tag="embedded",
        config=TINY / "tailtune-tiny.json",
        files={"embedded": TINY / "weights.safetensors"},
        stats=(HALF, HALF),
    ),
}
LIBRARIES: dict[str, Callable[[str], BackboneSpec]] = {"open_clip": find_clip, "timm": find_timm}
"""What `<library>:<name>` means."""


def build_model(
    cfg: CfgNode,
    class_names: Sequence[str],
    fast: bool = True,
    descriptors: Sentences | None = None,
    pixels: Stats = (HALF, HALF),
) -> Classifier:
    """The model of a config, ready to train; on the meta device it has shapes only.

    Args:
        cfg: a resolved config.
        class_names: C names.
        fast: False builds the plain formulation of the encoder, for comparison.
        descriptors: sentences of each class, for `prompt descriptor`; not needed on the meta device.
        pixels: mean and deviation of the data, for a backbone that was trained on none.

    Raises:
        UserError: an unknown name, weights that are not there, or parts that do not fit each other.
    """
    if cfg.pixel_std and min(cfg.pixel_std) <= 0:
        raise UserError(f"pixel_std {cfg.pixel_std} divides the pixels: all three numbers must be above 0")
    spec = find_backbone(cfg.backbone)
    inputs = spec.inputs(cfg.pretrained)
    sentences = _sentences(cfg, class_names, descriptors)
    tuners = [name for name in (*TUNERS, "peft") if cfg[name]]
    patch_size = inputs.patch_size
    if patch_size and cfg.resolution % patch_size and cfg.resolution != inputs.resolution:
        raise UserError(  # the rest of the image would be cut off in silence
            f"resolution {cfg.resolution} must be a multiple of {patch_size}, the patch size of {cfg.backbone}"
        )
    split = Split(cfg.num_experts, cfg.expert_split, cfg.reduce_dimension)
    backbone = spec.build(cfg.pretrained, cfg.resolution, cfg.seed, cfg.zero_shot, fast, split)
    encoder = backbone.encoder
    if cfg.residual_dtype and isinstance(encoder, Plain):
        raise UserError(f"residual_dtype is of the ViT host's own forward, which {cfg.backbone} does not use; leave it")
    if cfg.zero_shot:
        head = _zero_shot_head(cfg, backbone, tuners, len(class_names))
    else:
        add_tuners(encoder, tuners, sizes_of(cfg, len(class_names), encoder), cfg.partial, cfg.seed)
        head = _head(cfg, encoder.feature_dim, len(class_names))
    peft = _peft(cfg, encoder)
    encoder.set_precision()
    own = backbone.stats or pixels
    stats = (cfg.pixel_mean or own[0], cfg.pixel_std or own[1])
    return Classifier(encoder, head, stats, _head_init(cfg, backbone, sentences), backbone.random, peft)


def find_backbone(name: str) -> BackboneSpec:
    """The entry of BACKBONES, or the backbone `open_clip:<name>` or `timm:<name>`.

    Raises:
        UserError: there is none of that name; says which are near.
    """
    library, _, own = name.partition(":")
    if library in LIBRARIES and own:
        with naming("backbone"):
            return LIBRARIES[library](own)
    if name not in BACKBONES:
        listed = {"open_clip": open_clip.list_models(), "timm": timm.list_models()}
        known = [f"{each}:{name}" for each, names in listed.items() if name in names]
        raise unknown("backbone", name, [*BACKBONES, *(known or (f"{each}:NAME" for each in LIBRARIES))])
    return BACKBONES[name]


def resolve(cfg: CfgNode) -> CfgNode:
    """The config with what it leaves to the backbone filled in: resolution, interpolation, expand."""
    with naming("backbone"):
        inputs = find_backbone(cfg.backbone).inputs(cfg.pretrained)
    cfg = cfg.clone()
    cfg.defrost()
    for key in ("resolution", "interpolation", "expand"):
        if cfg[key] is None:
            cfg[key] = getattr(inputs, key)
    cfg.freeze()
    return cfg


def sizes_of(cfg: CfgNode, classes: int, encoder: Host) -> Sizes:
    """What tuners are built from; LIFT's rules where the config leaves it open."""
    share = mask_ratio(classes, encoder.depth, encoder.feature_dim) if cfg.mask_ratio is None else cfg.mask_ratio
    return Sizes(
        bottleneck=cfg.adapter_dim or bottleneck_dim(classes, encoder.depth),
        prompts=cfg.vpt_len or VPT_LEN,
        mask_ratio=share,
        mask_seed=cfg.mask_seed or 0,
        adaptformer_scale=None if cfg.adaptformer_scale == "learnable" else cfg.adaptformer_scale,
    )


def _zero_shot_head(cfg: CfgNode, backbone: Backbone, tuners: Sequence[str], classes: int) -> nn.Module:
    if tuners:
        raise UserError(f"zero_shot trains nothing, so {', '.join(tuners)} would be left out; set one of them to False")
    if cfg.num_experts > 1:
        raise UserError(f"zero_shot has the one classifier of the text tower; leave out num_experts {cfg.num_experts}")
    assert backbone.embed_dim is not None  # else `project` would have been refused
    scale = backbone.text.logit_scale if backbone.text else 1.0
    return CosineClassifier(backbone.embed_dim, classes, scale).requires_grad_(False)


def _head(cfg: CfgNode, dim: int, classes: int) -> nn.Module:
    """The head, or one for each expert, which differ by their random start."""
    make = lookup(HEADS, cfg.classifier, "classifier")
    with seeded(cfg.seed, "head"):
        heads = [make(dim, classes, cfg.scale) for _ in range(cfg.num_experts)]
    return heads[0] if cfg.num_experts == 1 else ExpertHeads(heads)


def _peft(cfg: CfgNode, encoder: Host) -> Peft | None:
    if cfg.peft is None and cfg.peft_args:
        raise UserError("peft_args are of a tuner of the peft library, and none is asked for; name one, as `peft LoRA`")
    return add_peft(encoder, cfg.peft, cfg.peft_args or {}, cfg.partial, cfg.resolution, cfg.seed) if cfg.peft else None


def _head_init(cfg: CfgNode, backbone: Backbone, sentences: Sentences) -> HeadInit | None:
    name = "text_feat" if cfg.zero_shot else cfg.init_head
    if name is None:
        return None
    rows = lookup(HEAD_INITS, name, "init_head")
    if name in NEEDS_TEXT and backbone.embed_dim is None:
        raise UserError(f"init_head {name} needs a text tower, and {cfg.backbone} has none; try class_mean")
    return HeadInit(rows, backbone.text if name in NEEDS_TEXT else None, sentences)


def _sentences(cfg: CfgNode, class_names: Sequence[str], descriptors: Sentences | None) -> Sentences:
    """What the text tower reads about each class. Raises `UserError` for an unknown prompt."""
    if cfg.prompt != DESCRIPTOR:
        return fill(class_names, cfg.prompt)
    if not cfg.descriptors:
        raise UserError("prompt descriptor needs `descriptors`, a JSON file of class name → list of strings")
    return descriptors or ()
