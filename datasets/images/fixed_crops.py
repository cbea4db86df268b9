"""Five and ten crops of test images, in batches on the device."""

from collections.abc import Callable, Sequence

import torch

from tailtune.configs.lazy_module import lazy_module

v2 = lazy_module("torchvision.transforms.v2")


def five_crop(images: torch.Tensor | Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """Crops at the top left, top right, bottom left, bottom right and centre, as torchvision's FiveCrop.

    Args:
        images: [B, 3, H, W], or B tensors [3, H_b, W_b].
        size: side of the crops in pixels.

    Returns:
        [5, B, 3, size, size].
    """
    return _crop_batch(v2.functional.five_crop, images, size)


def ten_crop(images: torch.Tensor | Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """`five_crop` of the images, then of the images mirrored left to right, as torchvision's TenCrop.

    Args:
        images: [B, 3, H, W], or B tensors [3, H_b, W_b].
        size: side of the crops in pixels.

    Returns:
        [10, B, 3, size, size].
    """
    return _crop_batch(v2.functional.ten_crop, images, size)


def _crop_batch(
    crop: Callable[..., Sequence[torch.Tensor]], images: torch.Tensor | Sequence[torch.Tensor], size: int
) -> torch.Tensor:
    if isinstance(images, torch.Tensor):
        return torch.stack(list(crop(images, [size, size])))
    return torch.stack([torch.stack(list(crop(image, [size, size]))) for image in images], dim=1)
