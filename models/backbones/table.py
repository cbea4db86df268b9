"""BACKBONES: name → backbone; `open_clip:NAME` and `timm:NAME` need no entry."""

from collections.abc import Callable
from pathlib import Path

from tailtune.configs.errors import prefix_errors, unknown
from tailtune.configs.lazy_module import lazy_module
from tailtune.models.backbones.backbone_types import BackboneSpec
from tailtune.models.backbones.open_clip_backbone import OpenClipBackbone, find_open_clip_backbone
from tailtune.models.backbones.resnet import ResNetDesign
from tailtune.models.backbones.resnet_backbone import ResNetBackbone
from tailtune.models.backbones.timm_backbone import TimmBackbone, find_timm_backbone

open_clip = lazy_module("open_clip")
timm = lazy_module("timm")
TINY_CLIP = Path(__file__).parent.parent / "tiny_clip"
HALF = (0.5, 0.5, 0.5)

BACKBONES: dict[str, BackboneSpec] = {
    "CLIP-RN50": OpenClipBackbone("RN50-quickgelu"),
    "CLIP-RN101": OpenClipBackbone("RN101-quickgelu"),
    "CLIP-ViT-B/16": OpenClipBackbone("ViT-B-16-quickgelu"),
    "CLIP-ViT-B/32": OpenClipBackbone("ViT-B-32-quickgelu"),
    "CLIP-ViT-L/14": OpenClipBackbone("ViT-L-14-quickgelu"),
    "CLIP-ViT-L/14@336px": OpenClipBackbone("ViT-L-14-336-quickgelu"),
    # LIFT's names. The weights were fine-tuned on ImageNet-1k after ImageNet-21k, so they have seen ImageNet-LT's
    # labels; `timm:vit_base_patch16_224.augreg_in21k` has not.
    "IN21K-ViT-B/16": TimmBackbone("vit_base_patch16_224.augreg_in21k_ft_in1k", interpolation="bilinear"),
    "IN21K-ViT-B/16@384px": TimmBackbone("vit_base_patch16_384.augreg_in21k_ft_in1k", interpolation="bilinear"),
    "IN21K-ViT-L/16": TimmBackbone("vit_large_patch16_224.augreg_in21k_ft_in1k", interpolation="bilinear"),
    "IN21K-ViT-L/16@384px": TimmBackbone("vit_large_patch16_384.augreg_in21k_ft_in1k", interpolation="bilinear"),
    # LIFT+'s names, with the weights that timm gives for them by default. They have seen ImageNet-LT's labels.
    "IN1K-RN50": TimmBackbone("resnet50.a1_in1k"),
    "IN1K-RN101": TimmBackbone("resnet101.a1h_in1k"),
    "IN1K-RN152": TimmBackbone("resnet152.a1h_in1k"),
    "ResNet-20": ResNetBackbone("ResNet-20", ResNetDesign((3, 3, 3), cifar=True)),
    "ResNet-32": ResNetBackbone("ResNet-32", ResNetDesign((5, 5, 5), cifar=True)),
    "ResNet-32x4": ResNetBackbone("ResNet-32x4", ResNetDesign((5, 5, 5), cifar=True, widening=4)),  # that of GLMC
    "ResNet-44": ResNetBackbone("ResNet-44", ResNetDesign((7, 7, 7), cifar=True)),
    "ResNet-56": ResNetBackbone("ResNet-56", ResNetDesign((9, 9, 9), cifar=True)),
    # With `pretrained default` these, too, have seen ImageNet-LT's labels.
    "ResNet-10": ResNetBackbone("ResNet-10", ResNetDesign((1, 1, 1, 1))),
    "ResNet-50": ResNetBackbone("ResNet-50", ResNetDesign((3, 4, 6, 3), bottleneck=True), "resnet50.a1_in1k"),
    "ResNet-101": ResNetBackbone("ResNet-101", ResNetDesign((3, 4, 23, 3), bottleneck=True), "resnet101.a1_in1k"),
    "ResNet-152": ResNetBackbone("ResNet-152", ResNetDesign((3, 8, 36, 3), bottleneck=True), "resnet152.a1_in1k"),
    "ResNeXt-50": ResNetBackbone(
        "ResNeXt-50", ResNetDesign((3, 4, 6, 3), bottleneck=True, groups=32, group_width=4), "resnext50_32x4d.a1_in1k"
    ),
    "TinyCLIP": OpenClipBackbone(
        "tailtune-tiny",
        tag="embedded",
        config=TINY_CLIP / "tailtune-tiny.json",
        files={"embedded": TINY_CLIP / "weights.safetensors"},
        pixel_stats=(HALF, HALF),
    ),
}
LIBRARIES: dict[str, Callable[[str], BackboneSpec]] = {"open_clip": find_open_clip_backbone, "timm": find_timm_backbone}
"""Library → the function that finds its backbone; `<library>:<name>` calls it."""


def find_backbone(name: str) -> BackboneSpec:
    """The backbone that the option `backbone` names.

    Args:
        name: an entry of BACKBONES, `open_clip:NAME` or `timm:NAME`.

    Raises:
        UserError: there is no such backbone; the message names similar ones.
    """
    library, _, model = name.partition(":")
    if library in LIBRARIES and model:
        with prefix_errors("backbone"):
            return LIBRARIES[library](model)
    if name not in BACKBONES:
        models_of = {"open_clip": open_clip.list_models(), "timm": timm.list_models()}
        with_prefix = [f"{library}:{name}" for library, models in models_of.items() if name in models]
        patterns = (f"{library}:NAME" for library in LIBRARIES)
        raise unknown("backbone", name, [*BACKBONES, *(with_prefix or patterns)])
    return BACKBONES[name]
