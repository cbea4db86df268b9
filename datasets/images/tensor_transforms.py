"""Transforms of batches of uint8 tensors, in three parts: prepare and cut in the loader, finish on the device.

They make the same changes as the transforms of Pillow images in `transforms.py`, with random numbers of their own
(`draws.py`). Resized pixels differ from Pillow's by at most 1 of 255, bicubic ones by at most 2, if Pillow also resizes
the width first, as all of its versions before 13 do.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

from torch import Tensor

from tailtune.configs.lazy_module import lazy_module
from tailtune.datasets.images.growing_crop import GrowingArea
from tailtune.datasets.images.random_changes import (
    CROP_ATTEMPTS,
    blurred,
    greyed,
    jittered,
    mirrored,
    moved,
    resized_crops,
    rotated,
    shifted,
    square_crops,
)
from tailtune.datasets.images.random_steps import BLUR_SIGMAS, GREY_SHARE
from tailtune.datasets.images.transforms import eval_side, interpolation_mode

v2 = lazy_module("torchvision.transforms.v2")

Prepare = Callable[[Tensor], Tensor]
"""Images of one size [B, 3, h, w] → images of one size [B, 3, H, W], without random draws."""


CHUNK_BYTES = 2**19
"""Size of the uint8 images that are changed at once on a CPU. Some changes make float copies, four times as large."""


@dataclass(frozen=True)
class RandomChange:
    """A random change of the images of a batch."""

    draws: int
    """Random numbers that it needs for each image."""
    apply: Callable[[Tensor, Tensor], Tensor]
    """Images uint8 [B, 3, H, W] and numbers in [0, 1) [B, draws] → changed images, uint8 [B, 3, H', W']."""
    batched: bool = True
    """Whether it needs no Python code for a single image."""


@dataclass(frozen=True)
class TensorTransform:
    """The transform of a view. It holds no state, so equal draws give equal images in every process."""

    prepare: Prepare
    """The part without random draws, so its result can be kept from one epoch to the next."""
    cut: RandomChange | None = None
    """Makes all images equally large. It runs in the loader."""
    finish: tuple[RandomChange, ...] = field(default=())
    """Further changes, for whole batches on the device. They keep the size."""
    of_epoch: Callable[[int], float] | None = None
    """Epoch, counted from 0 → a number that `cut` takes after its random numbers."""

    @property
    def draws(self) -> int:
        """Random numbers of an image, those of `cut` first."""
        return self.cut_draws + sum(change.draws for change in self.finish)

    @property
    def cut_draws(self) -> int:
        """Random numbers of an image that `cut` needs."""
        return self.cut.draws if self.cut else 0

    def on_device(self, images: Tensor, draws: Tensor) -> Tensor:
        """Apply `finish`.

        Args:
            images: uint8 [B, 3, H, W]. They may be changed in place.
            draws: the numbers of each image after those of `cut`, [B, draws − cut_draws].

        Returns:
            uint8 [B, 3, H, W].
        """
        size = max(1, CHUNK_BYTES // images[0].numel())  # a processor is fastest with what fits into its cache
        if images.device.type != "cpu" or size >= len(images):
            return self._finished(images, draws)
        for chunk, numbers in zip(images.split(size), draws.split(size), strict=True):
            changed = self._finished(chunk, numbers)
            if changed.data_ptr() != chunk.data_ptr():
                chunk.copy_(changed)
        return images

    def _finished(self, images: Tensor, draws: Tensor) -> Tensor:
        parts = draws.split([change.draws for change in self.finish], 1)
        for change, numbers in zip(self.finish, parts, strict=True):
            images = change.apply(images, numbers)
        return images


def unaugmented_transform(resolution: int, interpolation: str) -> TensorTransform:
    """As `transforms.unaugmented_transform`."""
    return TensorTransform(partial(_resized_centre, resolution=resolution, side=resolution, mode=interpolation))


def eval_transform(resolution: int, interpolation: str, augment: str, margin: int | None = None) -> TensorTransform:
    """As `transforms.eval_transform`."""
    side = eval_side(resolution, augment, margin)
    return TensorTransform(partial(_resized_centre, resolution=resolution, side=side, mode=interpolation))


def resize_for_crops(resolution: int, expand: int, interpolation: str) -> TensorTransform:
    """As `transforms.resize_for_crops`: images of different sizes."""
    return TensorTransform(partial(_resized, side=resolution + expand, mode=interpolation))


def _resized(images: Tensor, side: int, mode: str) -> Tensor:
    """Resize the short side."""
    resized: Tensor = v2.functional.resize(images, [side], interpolation_mode(mode), antialias=True)
    return resized


def _resized_centre(images: Tensor, resolution: int, side: int, mode: str) -> Tensor:
    centre: Tensor = v2.functional.center_crop(_resized(images, side, mode), [resolution, resolution])
    return centre


def _unchanged(images: Tensor) -> Tensor:
    return images


MIRRORED = RandomChange(1, mirrored)


def _random_crop(resolution: int, mode: str) -> RandomChange:
    crop = partial(resized_crops, side=resolution, mode=mode, smallest_area=0.08)
    return RandomChange(2 * CROP_ATTEMPTS + 2, crop, batched=False)


def _lift(resolution: int, mode: str) -> TensorTransform:
    return TensorTransform(_unchanged, _random_crop(resolution, mode), (MIRRORED,))


def _mda(resolution: int, mode: str) -> TensorTransform:
    crop = RandomChange(3, partial(square_crops, side=resolution, mode=mode), batched=False)
    return TensorTransform(_unchanged, crop, of_epoch=GrowingArea())


def _imagenet(resolution: int, mode: str) -> TensorTransform:
    jitter = RandomChange(4, partial(jittered, strength=0.4))
    return TensorTransform(_unchanged, _random_crop(resolution, mode), (MIRRORED, jitter))


def _imagenet_blur(resolution: int, mode: str) -> TensorTransform:
    plain, grey = _imagenet(resolution, mode), RandomChange(1, partial(greyed, share=GREY_SHARE))
    blur = RandomChange(2, partial(blurred, share=0.5, sigmas=BLUR_SIGMAS))
    return TensorTransform(plain.prepare, plain.cut, (*plain.finish, grey, blur))


def _cifar_crop(resolution: int, mode: str) -> TensorTransform:
    shift = RandomChange(2, partial(shifted, side=resolution))
    return TensorTransform(partial(_resized, side=resolution, mode=mode), shift, (MIRRORED,))


def _cifar(resolution: int, mode: str) -> TensorTransform:
    plain = _cifar_crop(resolution, mode)
    return TensorTransform(plain.prepare, plain.cut, (MIRRORED, RandomChange(1, partial(rotated, degrees=15))))


def _digits(resolution: int, mode: str) -> TensorTransform:
    move = RandomChange(4, partial(moved, degrees=10, shift=0.1, scale=0.1))
    return TensorTransform(unaugmented_transform(resolution, mode).prepare, None, (move,))


def _none(resolution: int, mode: str) -> TensorTransform:
    return eval_transform(resolution, mode, "none")


def _whole(resolution: int, mode: str) -> TensorTransform:
    return eval_transform(resolution, mode, "whole")


TENSOR_AUGMENTS: Mapping[str, Callable[[int, str], TensorTransform]] = MappingProxyType(
    {
        "lift": _lift,
        "mda": _mda,
        "cifar": _cifar,
        "cifar_crop": _cifar_crop,
        "imagenet": _imagenet,
        "inat": _lift,
        "imagenet_blur": _imagenet_blur,
        "digits": _digits,
        "none": _none,
        "whole": _whole,
    }
)
"""Entry of `AUGMENTS` → the same augmentation of tensors. Pillow makes those that are missing here."""
