"""Converts grey images of more than 8 bits per pixel to 8 bits by scaling; Pillow's `convert` would clip them at 255.

| type of the pixel values | range that is mapped to 0 … 255 |
|---|---|
| 16 bits (PNG, TIFF, PGM) | 0 … 65535: the high byte, as Pillow does for 16-bit colour |
| 12 bits (TIFF) | 0 … 4095: the high 8 bits |
| signed 16 or 32 bits (TIFF) | the first of 0 … 255, 0 … 65535 that holds all values of the image |
| float (TIFF, PFM) | the first of 0 … 1, 0 … 255, 0 … 65535 that holds all values of the image |

The last two types have no range of their own, so the values decide. Resampling can leave values slightly outside a
range. They are clipped if they exceed the range by at most a tenth of it, or are negative by at most a tenth of the
largest value. An image with other values, or with values that are not finite, is refused.
"""

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageOps

RANGES = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}
"""Mode of Pillow → upper ends of the ranges that its values may have; each range begins at 0."""
OVERSHOOT = 0.1
"""How far values may lie outside a range, as a share of it."""
STRIP_PIXELS = 1 << 20
"""Pixels that are converted at once, so that a large image needs no second copy in memory."""
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
"""Two tags of TIFF, and a value of the second one."""


def is_deep_grey(mode: str) -> bool:
    """Whether a mode of Pillow is grey with more than 8 bits per pixel: `I`, `F`, `I;16`, `I;16B` and similar ones."""
    return mode in RANGES or mode.startswith("I;16")


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert a grey image of more than 8 bits to Pillow's mode L.

    Args:
        image: an image with a mode for which `is_deep_grey` is true.

    Returns:
        An image of mode L and of the same size.

    Raises:
        ValueError: the values of the image fit into none of the ranges of its mode.
    """
    scale = _scale(image)
    result = Image.new("L", image.size)
    for top, strip in _strips(image):
        result.paste(Image.fromarray(scale(strip)), (0, top))
    # In some TIFF files 0 means white. Pillow inverts them itself where they have 8 bits, not where they have more.
    return ImageOps.invert(result) if _tag(image, PHOTOMETRIC, 1) == WHITE_IS_ZERO else result


def _scale(image: Image.Image) -> Callable[[np.ndarray], np.ndarray]:
    """The function that maps values [h, W] to uint8 [h, W]."""
    # Pillow reads 16-bit PGM files with mode I; some of its versions do so for PNG files, too.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        bits = _tag(image, BITS_PER_SAMPLE, 16)
        return lambda values: (values >> (bits - 8)).astype(np.uint8)
    limit = _limit(image)
    return lambda values: np.rint((values * (255 / limit)).clip(0, 255)).astype(np.uint8)


def _limit(image: Image.Image) -> float:
    """The upper end of the first range that holds all values."""
    extremes = [(float(strip.min()), float(strip.max())) for _, strip in _strips(image)]
    low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
    if not np.isfinite([value for pair in extremes for value in pair]).all():
        raise ValueError("holds values that are not finite")
    for limit in RANGES[image.mode]:
        if low >= -OVERSHOOT * high and high <= (1 + OVERSHOOT) * limit:
            return limit
    known = ", ".join(f"0 … {limit:.0f}" for limit in RANGES[image.mode])
    raise ValueError(f"holds values from {low:g} to {high:g}, expected one of {known}: convert it to 8 or 16 bits")


def _strips(image: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    """The image from top to bottom, as pairs of first row and values [h, W]."""
    width, height = image.size
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        yield top, np.asarray(image.crop((0, top, width, min(top + rows, height))))


def _tag(image: Image.Image, tag: int, default: int) -> int:
    """The first value of a TIFF tag; the default if the tag is missing or the image is of another format."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)
