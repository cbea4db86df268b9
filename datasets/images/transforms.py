"""Augmentations and test transforms: from a PIL image to a uint8 tensor [3, H, W].

Pixels are normalised later, on the device. The transforms are torchvision's v2 on PIL images. They give the same pixels
as the v1 transforms that LIFT, SADE and RIDE use. All random draws come from torch's global CPU generator, which
`View` (datasets/view.py) seeds for each image.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image

from tailtune.configs.errors import lookup, unknown
from tailtune.configs.lazy_module import lazy_module
from tailtune.datasets.images.growing_crop import GrowingCrop
from tailtune.datasets.images.random_steps import Cutout, RandAugment, Step, cifar_policy, simclr

v2 = lazy_module("torchvision.transforms.v2")

Transform = Callable[..., torch.Tensor]
"""PIL image → uint8 [3, H, W], or uint8 [T, 3, H, W] for T draws."""

INTERPOLATIONS = ("bilinear", "bicubic")

FULL_FRAME = ("cifar", "cifar_crop", "cifar_auto", "cifar_auto_cutout", "digits", "sade_cifar", "whole")
"""Augmentations of small images whose object fills the frame. Their test transform does not crop."""

UNMIRRORED = ("digits",)
"""Augmentations of images that change their meaning when they are mirrored."""


def unaugmented_transform(resolution: int, interpolation: str) -> Transform:
    """Resize the short side to the resolution and cut out the centre, as LIFT does for initialising the head.

    Args:
        resolution: side of the result in pixels.
        interpolation: an entry of `INTERPOLATIONS`.

    Returns:
        PIL image → uint8 [3, resolution, resolution].

    Raises:
        UserError: an unknown interpolation.
    """
    return _resized_centre(resolution, resolution, interpolation)


def eval_transform(resolution: int, interpolation: str, augment: str, margin: int | None = None) -> Transform:
    """The test transform that belongs to an augmentation: the centre of the resized image.

    Args:
        resolution: side of the result in pixels.
        interpolation: an entry of `INTERPOLATIONS`.
        augment: name of the augmentation.
        margin: see `eval_side`.

    Returns:
        PIL image → uint8 [3, resolution, resolution].

    Raises:
        UserError: an unknown interpolation.
    """
    return _resized_centre(resolution, eval_side(resolution, augment, margin), interpolation)


def eval_side(resolution: int, augment: str, margin: int | None = None) -> int:
    """The length in pixels to which `eval_transform` resizes the short side before it crops.

    Args:
        resolution: side of the crop in pixels.
        augment: name of the augmentation.
        margin: by how many pixels the short side is longer than the crop. None: the crop is 7/8 of it (256 → 224
            pixels), or all of it for the augmentations in `FULL_FRAME`.
    """
    if margin is not None:
        return resolution + margin
    return resolution if augment in FULL_FRAME else resolution * 8 // 7


def resize_for_crops(resolution: int, expand: int, interpolation: str) -> Transform:
    """Resize the whole image for `five_crop` or `ten_crop`, which are applied on the device.

    Args:
        resolution: side of the later crops in pixels.
        expand: by how many pixels the short side is longer than that.
        interpolation: an entry of `INTERPOLATIONS`.

    Returns:
        PIL image → uint8 [3, H, W] with min(H, W) = resolution + expand.

    Raises:
        UserError: an unknown interpolation.
    """
    return _compose(_resize(resolution + expand, interpolation))


def repeated(transform: Transform, times: int) -> Transform:
    """Several independent draws of a transform.

    Args:
        transform: PIL image → uint8 [3, H, W], with random draws.
        times: number of draws T.

    Returns:
        PIL image → uint8 [T, 3, H, W].
    """
    return partial(_draw_several, transform, times)  # not a lambda: views are pickled where workers are spawned


def train_transform(augment: str, resolution: int, interpolation: str, key: str = "augment") -> Transform:
    """The training transform of an augmentation.

    Args:
        augment: an entry of `AUGMENTS`.
        resolution: side of the result in pixels.
        interpolation: an entry of `INTERPOLATIONS`.
        key: the option that names the augmentation, for messages.

    Returns:
        PIL image → uint8 [3, resolution, resolution].

    Raises:
        UserError: an unknown augmentation or interpolation.
    """
    return lookup(AUGMENTS, augment, key)(resolution, interpolation)


def check_augment(augment: str, interpolation: str, key: str = "augment") -> None:
    """Check the names that `train_transform` takes, without the import of torchvision.

    Args:
        augment, interpolation, key: as in `train_transform`.

    Raises:
        UserError: an unknown augmentation or interpolation.
    """
    lookup(AUGMENTS, augment, key)
    check_interpolation(interpolation)


def check_interpolation(interpolation: str) -> None:
    """Raise a `UserError` if a word is not an entry of `INTERPOLATIONS`."""
    if interpolation not in INTERPOLATIONS:
        raise unknown("interpolation", interpolation, INTERPOLATIONS)


def _draw_several(transform: Transform, times: int, image: Image.Image) -> torch.Tensor:
    return torch.stack([transform(image) for _ in range(times)])


def _lift(resolution: int, interpolation: str) -> Transform:
    """LIFT: random crop (scale 0.08–1, ratio 3/4–4/3) and horizontal flip."""
    return _compose(_random_crop(resolution, interpolation), v2.RandomHorizontalFlip())


def _mda(resolution: int, interpolation: str) -> Transform:
    """LIFT+: a square crop whose smallest area grows with the epoch. Here it has the crops of the first epoch."""
    side = [resolution, resolution]
    return GrowingCrop(_compose(v2.Resize(side, interpolation=interpolation_mode(interpolation))))


def _imagenet(resolution: int, interpolation: str) -> Transform:
    """RIDE and SADE on ImageNet-LT and Places-LT: LIFT's augmentation, and colour jitter without hue."""
    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0)
    return _compose(_random_crop(resolution, interpolation), v2.RandomHorizontalFlip(), jitter)


def _cifar(resolution: int, interpolation: str) -> Transform:
    """RIDE and SADE on CIFAR: shift by up to 4 of 32 pixels, horizontal flip, rotation by up to 15°."""
    return _shifted_and_flipped(resolution, interpolation, v2.RandomRotation(15))


def _cifar_crop(resolution: int, interpolation: str) -> Transform:
    """MisLAS and H2T on CIFAR: shift by up to 4 of 32 pixels, horizontal flip."""
    return _shifted_and_flipped(resolution, interpolation)


def _cifar_auto(resolution: int, interpolation: str) -> Transform:
    """BalPoE's long training on CIFAR: shift by up to 4 of 32 pixels, horizontal flip, AutoAugment."""
    return _shifted_and_flipped(resolution, interpolation, cifar_policy())


def _cifar_auto_cutout(resolution: int, interpolation: str) -> Transform:
    """LGLA on CIFAR: as `cifar_auto`, then a black square of 16 of 32 pixels."""
    return _shifted_and_flipped(resolution, interpolation, cifar_policy(), Cutout(resolution // 2))


def _shifted_and_flipped(resolution: int, interpolation: str, *more: Step) -> Transform:
    shift = v2.RandomCrop(resolution, padding=resolution // 8)
    # The resize does not change an image of 32 pixels.
    return _compose(_resize(resolution, interpolation), shift, v2.RandomHorizontalFlip(), *more)


def _imagenet_randaug(resolution: int, interpolation: str) -> Transform:
    """BalPoE's long training and LGLA on ImageNet-LT: as `imagenet`, then RandAugment."""
    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0)
    return _compose(_random_crop(resolution, interpolation), v2.RandomHorizontalFlip(), jitter, RandAugment())


def _imagenet_blur(resolution: int, interpolation: str) -> Transform:
    """LGLA on Places-LT: as `imagenet`, then SimCLR's grey and blur."""
    return _compose(_random_crop(resolution, interpolation), *simclr(blurred=0.5, hue=0, jittered=1))


def _digits(resolution: int, interpolation: str) -> Transform:
    """A slight rotation, shift and scaling; never a flip, which would change a digit."""
    affine = v2.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=interpolation_mode("bilinear"))
    return _compose(_resize(resolution, interpolation), v2.CenterCrop(resolution), affine)


def _sade_cifar(resolution: int, interpolation: str) -> Transform:
    """SADE's views for test-time learning on CIFAR."""
    shift = v2.RandomCrop(resolution, padding=resolution // 8)
    return _compose(_resize(resolution, interpolation), shift, *simclr(blurred=0.2))


def _sade_imagenet(resolution: int, interpolation: str) -> Transform:
    """SADE's views for test-time learning on ImageNet-LT and Places-LT."""
    return _compose(_random_crop(resolution, interpolation, smallest_area=0.2), *simclr(blurred=0.5))


def _sade_inat(resolution: int, interpolation: str) -> Transform:
    """SADE's views for test-time learning on iNaturalist."""
    return _compose(_random_crop(resolution, interpolation), *simclr(blurred=0.5))


def _none(resolution: int, interpolation: str) -> Transform:
    """No augmentation: the test transform."""
    return eval_transform(resolution, interpolation, "none")


def _whole(resolution: int, interpolation: str) -> Transform:
    """No augmentation of images whose object fills the frame: the test transform, which does not crop them."""
    return eval_transform(resolution, interpolation, "whole")


AUGMENTS: Mapping[str, Callable[[int, str], Transform]] = MappingProxyType(
    {
        "lift": _lift,
        "mda": _mda,
        "cifar": _cifar,
        "cifar_crop": _cifar_crop,
        "imagenet": _imagenet,
        "inat": _lift,  # SADE uses no colour jitter on iNaturalist, which makes it the same as LIFT's
        "cifar_auto": _cifar_auto,
        "cifar_auto_cutout": _cifar_auto_cutout,
        "imagenet_randaug": _imagenet_randaug,
        "inat_randaug": _imagenet_randaug,  # BalPoE and LGLA also use its colour jitter on iNaturalist
        "imagenet_blur": _imagenet_blur,
        "digits": _digits,
        "sade_cifar": _sade_cifar,
        "sade_imagenet": _sade_imagenet,
        "sade_inat": _sade_inat,
        "none": _none,
        "whole": _whole,
    }
)
"""Name → function of resolution and interpolation that makes the training transform: entries of option `augment`."""
FIXED = ("none", "whole")
"""Those that draw no random numbers."""


def _compose(*steps: Step) -> Transform:
    pipeline: Transform = v2.Compose([*steps, v2.PILToTensor()])
    return pipeline


def _resized_centre(resolution: int, side: int, interpolation: str) -> Transform:
    return _compose(_resize(side, interpolation), v2.CenterCrop(resolution))


def _resize(side: int, interpolation: str) -> Step:
    return v2.Resize(side, interpolation=interpolation_mode(interpolation))


def _random_crop(resolution: int, interpolation: str, smallest_area: float = 0.08) -> Step:
    """A crop of a random area, between the share `smallest_area` of the image and the whole image."""
    return v2.RandomResizedCrop(resolution, scale=(smallest_area, 1.0), interpolation=interpolation_mode(interpolation))


def interpolation_mode(interpolation: str) -> Any:
    """torchvision's member for an interpolation, the value of which is the same word."""
    check_interpolation(interpolation)
    return v2.InterpolationMode(interpolation)
