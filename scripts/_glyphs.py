"""Renders characters for pretrain_tiny_clip.py: creates a bank of glyphs, and augments them.

There are 36 classes: ten digits and 26 letters; both cases of a letter are one class. The glyphs are outlines of
matplotlib's fonts, skeletons of these outlines, and pen strokes of the digits that were designed by hand.
"""

import string
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CANVAS, GLYPH, FRAME, SIZE = 64, 48, 36, 32  # pixels: bank image, glyph in it, augmented frame, model input
KIND_WEIGHTS = {"outline": 1.0, "skeleton": 1.0, "stroke": 3.0}  # a class with strokes (a digit) is drawn 2.5x as often
JITTERED = 64  # copies of each stroke drawing, each with its control points moved at random
CLASSES = string.digits + string.ascii_lowercase
# Pen strokes of the digits: points "xy" on a grid 0..6 by 0..9 (y down); "|" lifts the pen, "~" rounds the stroke.
STROKES = {
    "0": ("~30 12 05 18 39 58 65 52 30", "~40 12 06 28 49 57 63 41 20"),
    "1": ("30 39", "13 30 39", "13 30 39|19 59", "~23 31 30 34 39", "21 30 39|19 49", "04 30 39"),
    "2": ("~02 10 40 52 45 09|09 69", "~02 20 51 53 27 09 08 27 49 68",
          "~01 30 52 44 08|08 49 69", "~11 30 51 35 09 69"),
    "3": ("~01 20 51 53 24|~24 56 58 39 08", "00 60 24|~24 56 58 39 08",
          "~00 30 52 34 14 34 57 39 09", "~11 40 52 34 66 48 09"),
    "4": ("10 05 65|50 59", "20 06 66|41 49", "40 06 66|40 49",
          "~10 03 25 54|60 54 39", "30 05 55|33 39", "~30 15 06 36 66|43 49"),
    "5": ("60 10 04|~04 34 56 58 39 08", "~60 20 13 44 57 38 09",
          "10 14|~14 44 57 39 08|10 60", "50 20 14|~14 43 55 48 09"),
    "6": ("~40 12 06 18 39 58 56 45 25 07", "~30 13 07 29 48 56 35 17",
          "10 06|~06 18 39 58 56 35 06", "~51 20 05 18 49 67 45 16"),
    "7": ("00 60 29", "00 60 29|15 55", "02 00 60 39",
          "~01 20 50 61 45 39", "~01 20 60 45 39|25 65", "00 50 44 39|24 64"),
    "8": ("~30 11 12 34 56 58 39 18 16 34 52 51 30",
          "~51 20 12 34 57 48 19 07 35 52 50", "~30 12 34 52 30|~34 17 39 57 34"),
    "9": ("~52 40 11 03 24 53 52|~52 57 39 18 07", "~51 20 02 14 43 51|51 49", "~52 30 11 03 25 43 52|~52 56 38 19",
          "~40 12 24 53 50 40|50 39", "~51 21 03 25 52 55 29", "~60 20 02 14 44 61 57 39 08"),
}  # fmt: skip


@dataclass
class Bank:
    """Rendered glyphs."""

    images: Tensor  # uint8 [N, CANVAS, CANVAS]
    classes: Tensor  # int64 [N]
    weights: Tensor  # relative frequency with which each glyph is drawn, float64 [N]
    is_line: Tensor  # True for lines of one pixel (skeletons and strokes), which are thickened, bool [N]


def fit_glyph(image: Image.Image) -> np.ndarray:
    """Crop a drawing to its ink, scale it to GLYPH pixels with its aspect ratio, and centre it on the canvas."""
    box = image.getbbox()
    if box is None:
        raise ValueError("an empty glyph was rendered")
    ink = image.crop(box)
    scale = GLYPH / max(ink.size)
    ink = ink.resize([max(1, round(side * scale)) for side in ink.size], Image.Resampling.BILINEAR)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(ink, ((CANVAS - ink.width) // 2, (CANVAS - ink.height) // 2))
    return np.asarray(canvas)


def render_fonts(names: tuple[str, ...]) -> tuple[np.ndarray, list[int]]:
    """Render every digit and letter, in both cases, with the named fonts.

    Returns:
        Images, uint8 [N, CANVAS, CANVAS]; and their N classes.
    """
    images, classes = [], []
    for name in names:
        path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
        font = ImageFont.truetype(str(path), 2 * CANVAS)
        for character in string.digits + string.ascii_letters:
            image = Image.new("L", (6 * CANVAS, 6 * CANVAS))
            ImageDraw.Draw(image).text((2 * CANVAS, 2 * CANVAS), character, fill=255, font=font)
            images.append(fit_glyph(image))
            classes.append(CLASSES.index(character.lower()))
    return np.stack(images), classes


def round_off(points: np.ndarray) -> np.ndarray:
    """A smooth curve (Catmull-Rom spline) through the points."""
    before, after = 2 * points[0] - points[1], 2 * points[-1] - points[-2]
    p = np.concatenate([before[None], points, after[None]])
    t = np.linspace(0, 1, 9)[None, :, None]
    a, b, c, d = p[:-3, None], p[1:-2, None], p[2:-1, None], p[3:, None]
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return curve.reshape(-1, 2)


def draw_strokes(drawing: str, rng: np.random.RandomState) -> np.ndarray:
    """Draw one jittered pen-stroke digit with lines one pixel wide."""
    jitter = rng.uniform(0, 0.55)
    offset: dict[str, np.ndarray] = {}  # a point that belongs to several strokes moves equally in all of them
    image = Image.new("L", (CANVAS, CANVAS))
    lines = []
    for stroke in drawing.split("|"):
        for xy in stroke.lstrip("~").split():
            offset.setdefault(xy, np.array([int(xy[0]), int(xy[1])]) + rng.normal(0, jitter, 2))
        points = np.stack([offset[xy] for xy in stroke.lstrip("~").split()])
        lines.append(round_off(points) if stroke.startswith("~") else points)
    ink = np.concatenate(lines)
    low, span = ink.min(0), ink.max(0) - ink.min(0)
    scale = (GLYPH - 1) / span.max()
    for line in lines:
        placed = (line - low - span / 2) * scale + CANVAS / 2
        ImageDraw.Draw(image).line([tuple(point) for point in placed], fill=255, width=1)
    return np.asarray(image)


def thin(ink: np.ndarray) -> np.ndarray:
    """Skeletons of binary images [N, H, W] by the Zhang-Suen rules, all images at once."""
    ink = np.pad(ink.astype(bool), ((0, 0), (1, 1), (1, 1)))
    shifts = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))
    changed = True
    while changed:
        changed = False
        for first, second in (((0, 2, 4), (2, 4, 6)), ((0, 2, 6), (0, 4, 6))):
            near = np.stack([np.roll(ink, (-dy, -dx), axis=(1, 2)) for dy, dx in shifts])
            count = near.sum(0)
            turns = (~near & np.roll(near, -1, axis=0)).sum(0)
            drop = ink & (count >= 2) & (count <= 6) & (turns == 1)
            drop &= ~near[list(first)].all(0) & ~near[list(second)].all(0)
            ink = ink & ~drop
            changed = changed or bool(drop.any())
    return ink[:, 1:-1, 1:-1]


def build_bank(fonts: tuple[str, ...], with_strokes: bool, seed: int) -> Bank:
    """Render all glyphs: font outlines, their skeletons and (for training) jittered pen strokes of the digits."""
    outlines, classes = render_fonts(fonts)
    images = [outlines, thin(outlines > 127).astype(np.uint8) * 255]
    labels, kinds = classes * 2, ["outline"] * len(classes) + ["skeleton"] * len(classes)
    rng = np.random.RandomState(seed)
    for digit, drawings in STROKES.items() if with_strokes else ():
        for drawing in drawings:
            images.append(np.stack([draw_strokes(drawing, rng) for _ in range(JITTERED)]))
            labels += [int(digit)] * JITTERED
            kinds += ["stroke"] * JITTERED
    cells = list(zip(labels, kinds, strict=True))
    share = {cell: KIND_WEIGHTS[cell[1]] / cells.count(cell) for cell in set(cells)}
    weights = torch.tensor([share[cell] for cell in cells], dtype=torch.float64)
    is_line = torch.tensor([kind != "outline" for kind in kinds])
    return Bank(torch.from_numpy(np.concatenate(images)), torch.tensor(labels), weights, is_line)


def uniform(low: float, high: float, count: int, rng: torch.Generator) -> Tensor:
    """Uniform draws shaped to multiply a batch of images."""
    return low + (high - low) * torch.rand(count, 1, 1, 1, generator=rng)


def warp(images: Tensor, rng: torch.Generator) -> Tensor:
    """Random rotation, shear, squeeze, scale, shift and elastic noise, from the canvas to a frame of FRAME pixels."""
    n = len(images)
    angle, shear = uniform(-0.3, 0.3, n, rng).flatten(), uniform(-0.35, 0.35, n, rng).flatten()
    height = uniform(0.7, 1.06, n, rng).flatten()  # height of the glyph / height of the frame
    squeeze = torch.exp(uniform(-0.35, 0.35, n, rng)).flatten()
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    stretch = torch.stack([1 / squeeze, shear, torch.zeros(n), torch.ones(n)], 1).view(n, 2, 2)
    stretch = stretch * (GLYPH / CANVAS / height).view(n, 1, 1)
    shift = torch.randn(n, 2, 1, generator=rng) * 0.06
    grid = F.affine_grid(torch.cat([stretch @ rotation, shift], -1), [n, 1, FRAME, FRAME], align_corners=False)
    coarse = torch.randn(n, 2, 5, 5, generator=rng) * uniform(0, 0.09, n, rng)
    elastic = F.interpolate(coarse, size=(FRAME, FRAME), mode="bicubic", align_corners=True)
    return F.grid_sample(images, grid + elastic.permute(0, 2, 3, 1), align_corners=False)


def thicken(images: Tensor, is_line: Tensor, rng: torch.Generator) -> Tensor:
    """Max-pool by a random amount per image: lines to 3..9 pixels, outlines by at most one step; then soften."""
    level = torch.rand(len(images), generator=rng)
    steps = torch.where(is_line, 1 + (level * 4).long(), (level * 1.5).long())
    for step in range(1, 5):
        todo = steps >= step
        images[todo] = F.max_pool2d(images[todo], 3, stride=1, padding=1)
    return F.avg_pool2d(images, 3, stride=1, padding=1)


def degrade(images: Tensor, rng: torch.Generator) -> Tensor:
    """Chunk by chunk: pool most images to 8..12 pixels and back (or blur some), then crop or resize to SIZE."""
    chunks = []
    for chunk in images.split(16):
        kind, crop, pick = torch.rand(3, generator=rng).tolist()
        if kind < 0.75:
            side = 8 if pick < 0.5 else 9 + int((pick - 0.5) * 8)
            chunk = F.interpolate(chunk, size=(side, side), mode="area")
        elif pick < 0.5:
            chunk = F.avg_pool2d(chunk, 5 if pick < 0.2 else 3, stride=1, padding=2 if pick < 0.2 else 1)
        size = FRAME if crop < 0.5 else SIZE
        margin = (size - SIZE) // 2
        chunk = F.interpolate(chunk, size=(size, size), mode="bilinear", align_corners=False)
        chunks.append(chunk[:, :, margin : margin + SIZE, margin : margin + SIZE])
    return torch.cat(chunks)


def augment(bank: Bank, index: Tensor, rng: torch.Generator) -> Tensor:
    """Turn glyphs of the bank into model input [B, 3, SIZE, SIZE]: geometry, resolution, contrast, noise."""
    images = bank.images[index, None].float() / 255
    images = degrade(warp(thicken(images, bank.is_line[index], rng), rng), rng)
    n = len(images)
    images = images / images.amax((1, 2, 3), keepdim=True).clamp(min=0.1)
    images = images ** torch.exp(uniform(-0.6, 0.6, n, rng)) * uniform(0.6, 1.0, n, rng)
    noise = torch.randn(images.shape, generator=rng)
    images = images + noise * uniform(0, 0.08, n, rng)
    images = torch.where(uniform(0, 1, n, rng) < 0.2, 1 - images, images).clamp(0, 1)
    return ((images - 0.5) / 0.5).expand(-1, 3, -1, -1)
