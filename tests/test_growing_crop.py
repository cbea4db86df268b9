"""The crop of LIFT+ (`augment mda`): its schedules, its boxes and its pixels are those of the original code.

The numbers were produced by the modules of shijxcs/LIFT-plus (commit ea555ea).
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv
from yacs.config import CfgNode

from tailtune.configs.seeding import seeded
from tailtune.datasets.build_data import build_data
from tailtune.datasets.images.draws import uniform_draws
from tailtune.datasets.images.growing_crop import AREA_SCHEDULES, GrowingArea, GrowingCrop, area_bounds, square_box
from tailtune.datasets.images.random_changes import square_crops
from tailtune.datasets.images.tensor_transforms import TENSOR_AUGMENTS, TensorTransform
from tailtune.datasets.images.transforms import train_transform
from tailtune.datasets.options import DataOptions
from tailtune.datasets.sources.image_sources import ArraySource
from tailtune.datasets.view import View
from tailtune.trainers.option_schema import declared

Config = Callable[..., CfgNode]

CONVEX_15 = [0.08, 0.08235, 0.089436, 0.101371, 0.11835, 0.140674, 0.168773, 0.203257, 0.245, 0.295293]
CONVEX_15 += [0.356134, 0.430898, 0.526128, 0.658539, 1]
CONCAVE_15 = [0.08, 0.421461, 0.553872, 0.649102, 0.723866, 0.784707, 0.835, 0.876743, 0.911227, 0.939326]
CONCAVE_15 += [0.96165, 0.978629, 0.990564, 0.99765, 1]
AREAS = {
    ("convex", 5): [0.08, 0.109214, 0.203257, 0.391477, 1],
    ("linear", 5): [0.08, 0.31, 0.54, 0.77, 1],
    ("concave", 5): [0.08, 0.688523, 0.876743, 0.970786, 1],
    ("convex", 15): CONVEX_15,
    ("linear", 15): [0.08 + 0.92 / 14 * epoch for epoch in range(15)],
    ("concave", 15): CONCAVE_15,
    ("min", 5): [0.08] * 5,
    ("max", 5): [1] * 5,
}
"""Schedule and length → smallest area in each epoch."""


@pytest.mark.parametrize(("schedule", "epochs"), AREAS)
def test_the_smallest_area_of_each_epoch(schedule: str, epochs: int) -> None:
    area = GrowingArea(schedule, epochs)
    assert [area(epoch) for epoch in range(epochs)] == pytest.approx(AREAS[schedule, epochs], abs=6e-7)


def test_a_run_of_one_epoch_begins_as_any_other() -> None:
    assert GrowingArea("convex", 1)(0) == GrowingArea("linear", 1)(0) == 0.08 and GrowingArea("max", 1)(0) == 1


def test_the_option_has_every_schedule() -> None:
    assert set(declared()["mda_func"].choices) == AREA_SCHEDULES.keys()
    assert DataOptions().mda_func == GrowingArea().schedule


BOXES = {
    (500, 375, 0): [(54, 199, 287), (3, 123, 312), (70, 212, 203)],
    (500, 375, 2): [(24, 69, 305), (31, 131, 325), (83, 59, 244)],
    (500, 375, 3): [(22, 161, 331), (13, 151, 343), (39, 3, 296)],
    (500, 375, 4): [(0, 97, 375), (0, 123, 375), (0, 94, 375)],
    (300, 300, 0): [(24, 59, 227), (23, 2, 248), (59, 53, 156)],
    (1600, 100, 0): [(0, 1059, 100), (0, 1257, 100)],
}
"""Width, height and epoch of five → top, left and side of crops after `torch.manual_seed(7)`."""


@pytest.mark.parametrize(("width", "height", "epoch"), BOXES)
def test_boxes_of_pillow_are_those_of_the_original(width: int, height: int, epoch: int) -> None:
    """The pixels of the image are its coordinates, so that they show which part was cut out."""
    rows, columns = np.mgrid[:height, :width]
    image = Image.fromarray(
        np.stack([rows % 256, columns % 256, rows // 256 * 16 + columns // 256], -1).astype(np.uint8)
    )
    crop = GrowingCrop(tv.pil_to_tensor, GrowingArea("convex", 5))
    torch.manual_seed(7)
    for box in BOXES[width, height, epoch]:
        part = crop(image, epoch).int()
        first, high = part[:, 0, 0], part[2, 0, 0]
        top, left = first[0] + 256 * (high // 16), first[1] + 256 * (high % 16)
        assert (int(top), int(left), part.shape[1]) == box and part.shape[1] == part.shape[2]


def photo() -> Image.Image:
    """36 × 24 pixels of the specification: (7x + 11y), 5xy and x² + 3y, all modulo 256."""
    y, x = np.mgrid[:24, :36]
    return Image.fromarray((np.stack([7 * x + 11 * y, 5 * x * y, x**2 + 3 * y], -1) % 256).astype(np.uint8))


def test_pixels_of_pillow_are_those_of_the_original() -> None:
    sums = {}
    for mode in ("bicubic", "bilinear"):
        transform = train_transform("mda", 8, mode)
        assert isinstance(transform, GrowingCrop)
        torch.manual_seed(3)
        pixels = replace(transform, area=GrowingArea("convex", 5))(photo(), 2)
        sums[mode] = int(pixels.sum())
        if mode == "bicubic":
            assert pixels[0, 0].tolist() == [101, 112, 124, 135, 147, 158, 170, 181]
            assert pixels[2, 7].tolist() == [61, 68, 80, 97, 120, 148, 182, 219]
    assert sums == {"bicubic": 25_237, "bilinear": 25_234}


def test_tensors_have_the_pixels_of_pillow() -> None:
    """The same box, 8 1 13, cut out of a tensor: at most 2 of 255 apart."""
    height, width, smallest = 24, 36, GrowingArea("convex", 5)(2)
    low, high = area_bounds(height, width, smallest)
    draws = [(13**2 / height / width - low) / (high - low), 8.5 / (height - 12), 1.5 / (width - 12)]
    assert square_box(height, width, draws, smallest) == (8, 1, 13)
    image = photo()
    for mode, most in (("bicubic", 2), ("bilinear", 1)):
        found = square_crops(tv.pil_to_tensor(image)[None], torch.tensor([[*draws, smallest]]).double(), 8, mode)
        part = image.crop((1, 8, 14, 21)).resize((8, 8), getattr(Image.Resampling, mode.upper()))
        assert int((found[0].int() - tv.pil_to_tensor(part).int()).abs().max()) <= most


@pytest.mark.parametrize("size", [(375, 500), (1, 1), (3, 700), (224, 224)])
@pytest.mark.parametrize("epoch", range(5))
def test_boxes_of_tensors_are_squares_of_the_right_area_in_the_image(size: tuple[int, int], epoch: int) -> None:
    smallest = GrowingArea("linear", 5)(epoch)
    low, high = area_bounds(*size, smallest)
    for draws in uniform_draws(5, np.arange(300)[:, None], 3).tolist():
        top, left, side = square_box(*size, draws, smallest)
        assert 0 <= top <= size[0] - side and 0 <= left <= size[1] - side and side >= 1
        smaller, larger = (math.sqrt(share * size[0] * size[1]) for share in (low, high))
        assert smaller - 0.5 <= side <= larger + 0.5 and (side == min(size) or epoch < 4)


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_a_view_knows_the_epoch(backend: str, config: Config) -> None:
    words = ("fake_lt", "tiny_clip_peft", "pretrained", "none", "augment", "mda", "num_epochs", 5)
    view = build_data(config(*words, "image_backend", backend)).train
    source = ArraySource(np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8), np.arange(4), "x")
    view = View(source, np.arange(4), view.transform)
    batch = view.batch([(0, 0, 0), (1, 1, 0), (2, 4, 0), (3, 3, 0)])
    for number, epoch in enumerate((0, 1, 4, 3)):
        assert torch.equal(view[number, epoch, 0]["image"], batch["image"][number]), "whatever else is in the batch"
    last = [view[2, 4, repetition]["image"] for repetition in range(2)]
    assert torch.equal(last[0], last[1]), "a square image is not changed in the last epoch"
    assert not torch.equal(view[2, 3, 0]["image"], view[2, 3, 1]["image"])


def test_the_schedule_is_that_of_the_config(config: Config) -> None:
    words = ("fake_lt", "tiny_clip_peft", "augment", "mda", "mda_func", "concave", "num_epochs", 7)
    of_tensors, of_pillow = (build_data(config(*words, "image_backend", each)).train for each in ("torchvision", "pil"))
    assert isinstance(of_tensors.transform, TensorTransform) and isinstance(of_pillow.transform, GrowingCrop)
    assert of_tensors.transform.of_epoch == of_pillow.transform.area == GrowingArea("concave", 7)
    assert TENSOR_AUGMENTS["lift"](32, "bilinear").of_epoch is None


def test_draws_of_pillow_are_seeded_by_the_key() -> None:
    transform = GrowingCrop(tv.pil_to_tensor, GrowingArea("convex", 5))
    source = ArraySource(np.asarray(photo())[None], np.zeros(1, dtype=int), "x")
    with seeded(3, "augment", 2, 0, 1):
        expected = transform(photo(), 2)
    assert torch.equal(View(source, np.arange(1), transform, seed=3)[0, 2, 1]["image"], expected)
