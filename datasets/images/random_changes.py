"""Random changes of batches of uint8 tensors. Random numbers in [0, 1) are arguments, so a function draws nothing."""

import math
from functools import cache
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tailtune.configs.lazy_module import lazy_module
from tailtune.datasets.images.growing_crop import square_box
from tailtune.datasets.images.transforms import interpolation_mode

v2 = lazy_module("torchvision.transforms.v2")


CROP_ATTEMPTS = 10
"""How often torchvision's RandomResizedCrop draws a crop until one fits into the image."""
SMALLEST_RATIO, LARGEST_RATIO = 3 / 4, 4 / 3
"""Width over height of a random crop."""
BOX_BLURS = 3
"""Box blurs along each axis of which Pillow makes its Gaussian blur."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R 601-2), as in Pillow."""


def resized_crops(images: Tensor, draws: Tensor, side: int, mode: str, smallest_area: float) -> Tensor:
    """A random part of each image, resized; torchvision's RandomResizedCrop.

    Args:
        images: uint8 [B, 3, h, w].
        draws: [B, 2 · CROP_ATTEMPTS + 2].
        side: side of the result in pixels.
        mode: an entry of `INTERPOLATIONS`.
        smallest_area: smallest area of the part, as a share of the image.

    Returns:
        uint8 [B, 3, side, side].
    """
    made, interpolation = [], interpolation_mode(mode)
    for image, numbers in zip(images.unbind(), draws.tolist(), strict=True):
        box = crop_box(image.shape[-2], image.shape[-1], numbers, smallest_area)
        made.append(_resized_part(image, box, side, interpolation))
    return torch.cat(made) if len(made) > 1 else made[0]


def square_crops(images: Tensor, draws: Tensor, side: int, mode: str) -> Tensor:
    """A random square part of each image, resized; see growing_crop.py.

    Args:
        images: uint8 [B, 3, h, w].
        draws: three numbers in [0, 1), and the smallest area of the part as a share of the image, [B, 4].
        side: side of the result in pixels.
        mode: an entry of `INTERPOLATIONS`.

    Returns:
        uint8 [B, 3, side, side].
    """
    made, interpolation = [], interpolation_mode(mode)
    for image, (*numbers, smallest_area) in zip(images.unbind(), draws.tolist(), strict=True):
        top, left, length = square_box(image.shape[-2], image.shape[-1], numbers, smallest_area)
        made.append(_resized_part(image, (top, left, length, length), side, interpolation))
    return torch.cat(made) if len(made) > 1 else made[0]


def _resized_part(image: Tensor, box: tuple[int, int, int, int], side: int, interpolation: Any) -> Tensor:
    """The part (top, left, height, width) of an image [3, h, w] → [1, 3, side, side]."""
    top, left, height, width = box
    part = image[None, :, top : top + height, left : left + width]
    part = part.contiguous(memory_format=torch.channels_last)  # for this layout torch has the faster code
    resized: Tensor = v2.functional.resize(part, [side, side], interpolation, antialias=True)
    return resized


def crop_box(height: int, width: int, draws: list[float], smallest_area: float) -> tuple[int, int, int, int]:
    """The part of an image that a random crop shows, by the rule of torchvision's RandomResizedCrop.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        draws: 2 · CROP_ATTEMPTS + 2 numbers.
        smallest_area: smallest area of the part, as a share of the image.

    Returns:
        Top, left, height and width of the part, in pixels.
    """
    span = math.log(LARGEST_RATIO / SMALLEST_RATIO)
    *attempts, vertical, horizontal = draws
    for area_draw, ratio_draw in zip(attempts[::2], attempts[1::2], strict=True):
        area = height * width * (smallest_area + (1 - smallest_area) * area_draw)
        ratio = SMALLEST_RATIO * math.exp(span * ratio_draw)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(vertical * (height - h + 1)), int(horizontal * (width - w + 1)), h, w
    w = min(width, round(height * LARGEST_RATIO))
    h = min(height, round(width / SMALLEST_RATIO))
    return (height - h) // 2, (width - w) // 2, h, w


def shifted(images: Tensor, draws: Tensor, side: int) -> Tensor:
    """A random part of each image after an eighth of the side was added around it in black.

    Args:
        images: uint8 [B, 3, h, w] with h, w ≥ side.
        draws: [B, 2].
        side: side of the result in pixels.

    Returns:
        uint8 [B, 3, side, side].
    """
    windows = F.pad(images, [side // 8] * 4).unfold(2, side, 1).unfold(3, side, 1)  # [B, 3, tops, lefts, side, side]
    corners = (draws * torch.tensor(windows.shape[2:4])).long()
    return windows[torch.arange(len(images)), :, corners[:, 0], corners[:, 1]]


def mirrored(images: Tensor, draws: Tensor) -> Tensor:
    """Mirror each image left to right with probability 1/2, on a CPU in place. Draws: [B, 1]."""
    chosen = draws[:, 0] < 0.5
    if images.device.type != "cpu":
        return torch.where(chosen[:, None, None, None], images.flip(-1), images)
    pixels, rows = images.numpy(), chosen.numpy()  # half the work, but a GPU would have to wait for the number of rows
    pixels[rows] = torch.from_numpy(pixels[rows]).flip(-1).numpy()  # numpy copies rows faster, torch reverses faster
    return images


def rotated(images: Tensor, draws: Tensor, degrees: float) -> Tensor:
    """Rotate each image about its centre by at most so many degrees. The nearest pixel counts; outside is black.

    Args:
        images: uint8 [B, 3, S, S].
        draws: [B, 1].
        degrees: largest angle.
    """
    side = images.shape[-1]
    centre = side / 2 + 1  # in images with a black border of one pixel, to which all that is outside is moved
    x, y = _coordinates(_symmetric(draws, degrees), side, centre=centre)
    column, row = (values.clamp_(0, side + 1).int() for values in (x, y))
    place = row.mul_(side + 2).add_(column).flatten(1).long()
    bordered = F.pad(images, [1] * 4).flatten(2)
    return bordered.gather(2, place[:, None].expand(-1, 3, -1)).view(images.shape)


def moved(images: Tensor, draws: Tensor, degrees: float, shift: float, scale: float) -> Tensor:
    """Rotate, shift and scale each image; torchvision's RandomAffine.

    Args:
        images: uint8 [B, 3, H, W].
        draws: [B, 4].
        degrees: largest angle.
        shift: largest shift, as a share of the side.
        scale: largest change of the size.
    """
    side = images.shape[-1]
    x, y = _coordinates(-_symmetric(draws[:, :1], degrees), side, _symmetric(draws[:, 1:3], shift * side).round())
    scales = 1 + _symmetric(draws[:, 3:], scale)
    grid = torch.stack([x, y], -1) * (2 / side / scales[:, :, None, None])
    moved_images = F.grid_sample(images.float(), grid, "bilinear", align_corners=False)
    return moved_images.round_().to(torch.uint8)


def jittered(images: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Change brightness, contrast and saturation of each image, in random order; ColorJitter without hue.

    Each change mixes the image with a reference: black, the mean grey of the image, or the grey image.

    Args:
        images: uint8 [B, 3, H, W].
        draws: [B, 4].
        strength: largest change of each factor from 1.
    """
    pixels, orders = images.float(), _orders(images.device)
    factors = 1 + _symmetric(draws[:, :3], strength)
    chosen = (draws[:, 3] * len(orders)).long().clamp_max(len(orders) - 1)  # a draw near 1 becomes 1 in fp32
    kinds = orders[chosen]  # [B, 3]: which change comes first, second and third
    for place in range(3):
        kind = kinds[:, place, None, None, None]
        factor = factors.gather(1, kinds[:, place, None])[:, :, None, None]
        grey = _grey(pixels)
        reference = grey * (kind == 2) + grey.mean((2, 3), keepdim=True).round_() * (kind == 1)
        pixels = torch.lerp(reference, pixels, factor).clamp_(0, 255).floor_()  # Pillow rounds down after each change
    return pixels.to(torch.uint8)


def greyed(images: Tensor, draws: Tensor, share: float) -> Tensor:
    """Make each image grey with the probability `share`. Draws: [B, 1]."""
    return torch.where((draws < share)[:, :, None, None], _grey(images.float()).to(torch.uint8), images)


def blurred(images: Tensor, draws: Tensor, share: float, sigmas: tuple[float, float]) -> Tensor:
    """Blur each image with the probability `share`; Pillow's GaussianBlur, which is three box blurs along each axis.

    The sides of the boxes are real numbers (Gwosdek et al. 2011, section 2). Outside, the pixels of the border count.

    Args:
        images: uint8 [B, 3, H, W].
        draws: [B, 2].
        share: the probability.
        sigmas: smallest and largest standard deviation in pixels.
    """
    smallest, largest = sigmas
    sigma = torch.where(draws[:, :1] < share, smallest + (largest - smallest) * draws[:, 1:], 0)  # 0 changes nothing
    reach = int(_whole_radius(torch.tensor(largest))) + 1
    radius, distances = _box_radius(sigma), torch.arange(-reach, reach + 1, device=draws.device).abs()
    weights = ((radius + 1 - distances).clamp_(0, 1) / (2 * radius + 1)).T[..., None, None, None]  # [S, B, 1, 1, 1]
    pixels = images.float()
    for axis, border in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        for _ in range(BOX_BLURS):
            parts = F.pad(pixels, border, "replicate").unfold(axis, len(distances), 1)
            pixels = torch.full_like(pixels, 0.5)  # so that the nearest whole number is below
            for part, weight in zip(parts.unbind(-1), weights, strict=True):
                pixels.addcmul_(part, weight)
            pixels.floor_()
    return pixels.to(torch.uint8)


def _box_radius(sigma: Tensor) -> Tensor:
    """The radius of the box whose blur, applied `BOX_BLURS` times, has the standard deviation `sigma`, in pixels."""
    variance, whole = sigma.square() / BOX_BLURS, _whole_radius(sigma)
    return whole + (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1).square()))


def _whole_radius(sigma: Tensor) -> Tensor:
    """`_box_radius` rounded down."""
    return ((12 * sigma.square() / BOX_BLURS + 1).sqrt() - 1).div(2).floor()


def _grey(pixels: Tensor) -> Tensor:
    """Colours [B, 3, H, W] → whole numbers [B, 1, H, W]."""
    red, green, blue = (weight * channel for weight, channel in zip(LUMA, pixels.split(1, 1), strict=True))
    return (red + green + blue).round_()


@cache
def _orders(device: torch.device) -> Tensor:
    """The orders of three changes [6, 3]. A copy to a GPU for each batch would make the processor wait."""
    return torch.tensor(list(permutations(range(3))), device=device)


def _symmetric(draws: Tensor, largest: float) -> Tensor:
    """Numbers in [0, 1) → numbers in [−largest, largest)."""
    return (2 * draws - 1) * largest


def _coordinates(degrees: Tensor, side: int, shift: Tensor | None = None, centre: float = 0.0) -> tuple[Tensor, Tensor]:
    """Where the pixels of an image come from that is rotated counter-clockwise and then shifted.

    Args:
        degrees: angle of each image [B, 1].
        side: side S of the images in pixels.
        shift: shift to the right and down, in pixels [B, 2].
        centre: column and row of the centre.

    Returns:
        Column and row of each pixel's origin, in pixels, [B, S, S] each.
    """
    angle = degrees * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    centred = torch.arange(side, device=degrees.device) - (side - 1) / 2
    right, down = (centred, centred) if shift is None else (centred - shift[:, :1], centred - shift[:, 1:])
    x = (cos * right + centre)[:, None, :] - (sin * down)[:, :, None]
    y = (sin * right + centre)[:, None, :] + (cos * down)[:, :, None]
    return x, y
