"""Grey pictures of more than 8 bits a pixel → 8 bits: a ramp stays a ramp, where Pillow's `convert` clips at 255.

| what the file holds | what 0 … 255 stands for |
|---|---|
| 16 bits (PNG, TIFF, PGM) | 0 … 65535: the high byte, as Pillow does for 16-bit colour |
| 12 bits (TIFF) | 0 … 4095: the high 8 bits |
| signed 16 or 32 bits (TIFF) | the first of 0 … 255, 0 … 65535 that holds all values of the picture |
| float (TIFF, PFM) | the first of 0 … 1, 0 … 255, 0 … 65535 that holds all values of the picture |

The last two have no range of their own, so the values decide. What resampling leaves beyond a range is cut off: up to
a tenth of it above, and below zero up to a tenth of the largest value. Everything else, and what is not finite, is
refused rather than guessed.
"""

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageOps

RANGES = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}
"""Mode of Pillow → largest values that a range may have."""
OVERSHOOT = 0.1
STRIP = 1 << 20
"""Pixels at a time, so that a large picture is not in memory several times over."""
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0


def is_deep(mode: str) -> bool:
    """Whether a mode of Pillow is grey with more than 8 bits: `I`, `F`, `I;16` and its kin."""
    return mode in RANGES or mode.startswith("I;16")


def eight_bits(image: Image.Image) -> Image.Image:
    """A picture for which `is_deep` holds → mode L.

    Raises:
        ValueError: no range holds its values.
    """
    scale = _scale(image)
    result = Image.new("L", image.size)
    for top, strip in _strips(image):
        result.paste(Image.fromarray(scale(strip)), (0, top))
    # Pillow turns 8 bits of a TIFF around whose zero is white, and leaves 16 bits and floats as they are.
    return ImageOps.invert(result) if _tag(image, PHOTOMETRIC, 1) == WHITE_IS_ZERO else result


def _scale(image: Image.Image) -> Callable[[np.ndarray], np.ndarray]:
    """Values [h, W] → uint8 [h, W]."""
    # Pillow gives mode I to 16 bits of a PGM, and some of its versions to those of a PNG.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        bits = _tag(image, BITS_PER_SAMPLE, 16)
        return lambda values: (values >> (bits - 8)).astype(np.uint8)
    limit = _limit(image)
    return lambda values: np.rint((values * (255 / limit)).clip(0, 255)).astype(np.uint8)


def _limit(image: Image.Image) -> float:
    """The end of the first range that holds all values."""
    ends = [(float(strip.min()), float(strip.max())) for _, strip in _strips(image)]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    if not np.isfinite([value for pair in ends for value in pair]).all():
        raise ValueError("holds values that are not finite")
    for limit in RANGES[image.mode]:
        if low >= -OVERSHOOT * high and high <= (1 + OVERSHOOT) * limit:
            return limit
    known = ", ".join(f"0 … {limit:.0f}" for limit in RANGES[image.mode])
    raise ValueError(f"holds values from {low:g} to {high:g}, expected one of {known}: convert it to 8 or 16 bits")


def _strips(image: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, values [h, W]) from top to bottom."""
    width, height = image.size
    rows = max(1, STRIP // width)
    for top in range(0, height, rows):
        yield top, np.asarray(image.crop((0, top, width, min(top + rows, height))))


def _tag(image: Image.Image, tag: int, default: int) -> int:
    """First value of a tag of a TIFF; the default for other formats, and where it stands for nothing."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)
