"""From a PIL image to a uint8 tensor [3, H, W]; normalisation happens on the device.

All is torchvision's v2 on PIL images, whose pixels equal v1's, which LIFT, SADE and RIDE trained with. Every draw
comes from torch's global CPU generator; `bundle.View` seeds it for each image.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from tailtune.configs.errors import lookup

Transform = Callable[..., torch.Tensor]
"""PIL image → uint8 [3, H, W], or [T, 3, H, W] for T draws."""

Step = Callable[..., Image.Image]

INTERPOLATIONS = MappingProxyType({"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC})

FULL_FRAME = ("cifar", "cifar_crop", "digits", "sade_cifar")
"""Augmentations of small images whose object fills the frame: their test transform crops nothing."""

UNMIRRORED = ("digits",)
"""Augmentations of images that mean something else in the mirror."""


def plain_transform(resolution: int, interpolation: str) -> Transform:
    """The centre of the image, short side resized to the resolution (LIFT's transform for head initialisation)."""
    return _centre(resolution, resolution, interpolation)


def eval_transform(resolution: int, interpolation: str, augment: str) -> Transform:
    """The counterpart of an augmentation: centre crop of 7/8 of the short side (256 → 224), or the full frame."""
    return _centre(resolution, eval_side(resolution, augment), interpolation)


def eval_side(resolution: int, augment: str) -> int:
    """Side in pixels to which `eval_transform` resizes the shorter side before it cuts out the centre."""
    return resolution if augment in FULL_FRAME else resolution * 8 // 7


def crop_resize(resolution: int, expand: int, interpolation: str) -> Transform:
    """The whole image, short side `resolution + expand`; `five_crop` or `ten_crop` cuts it on the device."""
    return _compose(_resize(resolution + expand, interpolation))


def repeated(transform: Transform, times: int) -> Transform:
    """Independent draws of a transform, [T, 3, H, W]."""
    return partial(_draws, transform, times)  # no lambda: where workers are spawned, views are pickled


def train_transform(augment: str, resolution: int, interpolation: str, kind: str = "augment") -> Transform:
    """An augmentation by its name. Raises `UserError` for an unknown one, which names the option as `kind`."""
    return lookup(AUGMENTS, augment, kind)(resolution, interpolation)


def five_crop(images: torch.Tensor | Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """Top left, top right, bottom left, bottom right and centre (torchvision's FiveCrop).

    Args:
        images: [B, 3, H, W], or B tensors [3, H_b, W_b].
        size: side of the crops.

    Returns:
        [5, B, 3, size, size].
    """
    return _cut(functional.five_crop, images, size)


def ten_crop(images: torch.Tensor | Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """`five_crop` of the images, then of the images mirrored left to right (torchvision's TenCrop)."""
    return _cut(functional.ten_crop, images, size)


def _cut(
    crop: Callable[..., Sequence[torch.Tensor]], images: torch.Tensor | Sequence[torch.Tensor], size: int
) -> torch.Tensor:
    if isinstance(images, torch.Tensor):
        return torch.stack(list(crop(images, [size, size])))
    return torch.stack([torch.stack(list(crop(image, [size, size]))) for image in images], dim=1)


def _draws(transform: Transform, times: int, image: Image.Image) -> torch.Tensor:
    return torch.stack([transform(image) for _ in range(times)])


def _lift(resolution: int, interpolation: str) -> Transform:
    """LIFT: random crop (scale 0.08–1, ratio 3/4–4/3) and flip."""
    return _compose(_random_crop(resolution, interpolation), v2.RandomHorizontalFlip())


def _imagenet(resolution: int, interpolation: str) -> Transform:
    """RIDE, SADE on ImageNet-LT and Places-LT: LIFT's and colour jitter without hue."""
    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0)
    return _compose(_random_crop(resolution, interpolation), v2.RandomHorizontalFlip(), jitter)


def _cifar(resolution: int, interpolation: str) -> Transform:
    """RIDE, SADE on CIFAR: shift by up to 4 of 32 pixels, flip, rotation by up to 15°."""
    shift = v2.RandomCrop(resolution, padding=resolution // 8)
    # A 32-pixel image passes the resize unchanged.
    return _compose(_resize(resolution, interpolation), shift, v2.RandomHorizontalFlip(), v2.RandomRotation(15))


def _cifar_crop(resolution: int, interpolation: str) -> Transform:
    """MisLAS, H2T on CIFAR: the same without rotation."""
    shift = v2.RandomCrop(resolution, padding=resolution // 8)
    return _compose(_resize(resolution, interpolation), shift, v2.RandomHorizontalFlip())


def _digits(resolution: int, interpolation: str) -> Transform:
    """A slightly displaced digit, never mirrored."""
    affine = v2.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=INTERPOLATIONS["bilinear"])
    return _compose(_resize(resolution, interpolation), v2.CenterCrop(resolution), affine)


def _sade_cifar(resolution: int, interpolation: str) -> Transform:
    """Views of SADE's test-time learning on CIFAR."""
    shift = v2.RandomCrop(resolution, padding=resolution // 8)
    return _compose(_resize(resolution, interpolation), shift, *_simclr(blurred=0.2))


def _sade_imagenet(resolution: int, interpolation: str) -> Transform:
    """Views of SADE's test-time learning on ImageNet-LT and Places-LT."""
    return _compose(_random_crop(resolution, interpolation, least=0.2), *_simclr(blurred=0.5))


def _sade_inat(resolution: int, interpolation: str) -> Transform:
    """Views of SADE's test-time learning on iNaturalist."""
    return _compose(_random_crop(resolution, interpolation), *_simclr(blurred=0.5))


def _none(resolution: int, interpolation: str) -> Transform:
    return eval_transform(resolution, interpolation, "none")


AUGMENTS: Mapping[str, Callable[[int, str], Transform]] = MappingProxyType(
    {
        "lift": _lift,
        "cifar": _cifar,
        "cifar_crop": _cifar_crop,
        "imagenet": _imagenet,
        "inat": _lift,  # SADE leaves the colours of iNaturalist alone, which is LIFT's augmentation
        "digits": _digits,
        "sade_cifar": _sade_cifar,
        "sade_imagenet": _sade_imagenet,
        "sade_inat": _sade_inat,
        "none": _none,
    }
)


def _simclr(blurred: float) -> tuple[Step, ...]:
    """Colours, blur and flip of SimCLR (Chen et al. 2020, appendix A), half as strong in colour; SADE varies the blur.

    Args:
        blurred: share of the images that are.
    """
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    return jitter, v2.RandomGrayscale(0.2), v2.RandomApply([_blur], p=blurred), v2.RandomHorizontalFlip()


def _blur(image: Image.Image) -> Image.Image:
    """PIL's Gaussian blur, which repeated box blurs approximate and torchvision's does not equal."""
    return image.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(0.1, 2.0))))


def _compose(*steps: Step) -> Transform:
    pipeline: Transform = v2.Compose([*steps, v2.PILToTensor()])
    return pipeline


def _centre(resolution: int, side: int, interpolation: str) -> Transform:
    return _compose(_resize(side, interpolation), v2.CenterCrop(resolution))


def _resize(side: int, interpolation: str) -> v2.Transform:
    return v2.Resize(side, interpolation=lookup(INTERPOLATIONS, interpolation, "interpolation"))


def _random_crop(resolution: int, interpolation: str, least: float = 0.08) -> v2.Transform:
    """A crop of `least` to all of the area."""
    mode = lookup(INTERPOLATIONS, interpolation, "interpolation")
    return v2.RandomResizedCrop(resolution, scale=(least, 1.0), interpolation=mode)
