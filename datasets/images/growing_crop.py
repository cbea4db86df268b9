"""LIFT+'s minimalist crop: a square that keeps its shape, whose smallest area grows to the full image over training.

Source: Shi et al. 2025 (arXiv 2504.13282). The image is neither mirrored nor stretched.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from PIL import Image

FIRST_AREA = 0.08
"""Smallest area of a crop in the first epoch, as a share of the image."""

AREA_SCHEDULES: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        "min": lambda t: 0.0,
        "linear": lambda t: t,
        "convex": lambda t: 1 - math.sqrt(1 - t**2),
        "concave": lambda t: math.sqrt(1 - (1 - t) ** 2),
        "max": lambda t: 1.0,
    }
)
"""Name → growth: the share t of training (0 in the first epoch, 1 in the last) → 0 for FIRST_AREA, 1 for the image."""


@dataclass(frozen=True)
class GrowingArea:
    """Epoch, counted from 0 → smallest area of a crop, as a share of the image.

    A run of one epoch has the crops of a first epoch.
    """

    schedule: str = "convex"
    """An entry of AREA_SCHEDULES."""
    epochs: int = 1
    """Length of the training."""

    @property
    def depends_on_length(self) -> bool:
        """Whether the crops of an epoch depend on `epochs`."""
        return self.schedule not in ("min", "max")

    def __call__(self, epoch: int) -> float:
        t = min(1.0, epoch / max(1, self.epochs - 1))
        return FIRST_AREA + (1 - FIRST_AREA) * AREA_SCHEDULES[self.schedule](t)


@dataclass(frozen=True)
class GrowingCrop:
    """The crop of Pillow images, with the draws of LIFT+: area, top and left from torch's global generator."""

    transform: Callable[[Image.Image], torch.Tensor]
    """A square part of an image → uint8 [3, H, W]."""
    area: GrowingArea = GrowingArea()

    def __call__(self, image: Image.Image, epoch: int = 0) -> torch.Tensor:
        """Pillow image → uint8 [3, H, W]; `epoch` counts from 0."""
        width, height = image.size
        low, high = area_bounds(height, width, self.area(epoch))
        side = square_side(height, width, float(torch.empty(1).uniform_(low, high)))
        top = int(torch.randint(0, height - side + 1, (1,)))
        left = int(torch.randint(0, width - side + 1, (1,)))
        return self.transform(image.crop((left, top, left + side, top + side)))


def square_box(height: int, width: int, draws: list[float], smallest_area: float) -> tuple[int, int, int]:
    """The part of an image that a crop shows.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        draws: three numbers in [0, 1): for area, top and left.
        smallest_area: smallest area of the part, as a share of the image.

    Returns:
        Top, left and side of the part, in pixels.
    """
    low, high = area_bounds(height, width, smallest_area)
    side = square_side(height, width, low + (high - low) * draws[0])
    return int(draws[1] * (height - side + 1)), int(draws[2] * (width - side + 1)), side


def area_bounds(height: int, width: int, smallest_area: float) -> tuple[float, float]:
    """Smallest and largest area of a square part, as shares of the image: no square is larger than the short side."""
    largest = min(height, width) ** 2 / (height * width)
    return min(smallest_area, largest), largest


def square_side(height: int, width: int, area: float) -> int:
    """Side in pixels, at least 1, of the square part with an area that is a share of the image."""
    return min(max(1, round(math.sqrt(area * height * width))), height, width)
