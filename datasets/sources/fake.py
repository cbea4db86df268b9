"""Generated images that a model can learn in seconds: for tests, and for a first run without any data."""

import numpy as np

from tailtune.configs.errors import UserError
from tailtune.configs.seeding import mix
from tailtune.datasets.sources.image_sources import ArraySource

TRAIN_PER_CLASS, TEST_PER_CLASS = 40, 10
MOST_CLASSES = 1000
"""All images are held in memory and drawn at every start, which takes 5 ms a class."""
SIDE = 32
ODD_SIZES = {3: (32, 44), 5: (40, 32)}
"""Shapes (H, W) of a few images of every class, so that resizing is more than a copy."""


def check_classes(num_classes: int) -> int:
    """The number itself. Raises `UserError` where it is too large."""
    if num_classes > MOST_CLASSES:
        raise UserError(f"num_classes {num_classes}: dataset Fake draws images of at most {MOST_CLASSES} classes")
    return num_classes


def fake_sources(num_classes: int) -> tuple[ArraySource, ArraySource]:
    """Training (40 a class) and test images (10 a class), sorted by class, the same in every process."""
    return (
        _fake_split(num_classes, TRAIN_PER_CLASS, "train"),
        _fake_split(num_classes, TEST_PER_CLASS, "test"),
    )


def _fake_split(num_classes: int, per_class: int, split: str) -> ArraySource:
    rng = np.random.default_rng(mix("fake", split))
    labels = np.repeat(np.arange(num_classes), per_class)
    images = [
        _fake_image(int(label), num_classes, ODD_SIZES.get(i % per_class, (SIDE, SIDE)), rng)
        for i, label in enumerate(labels)
    ]
    return ArraySource(images, labels, f"fake {split}")


def _fake_image(label: int, num_classes: int, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A grating whose direction and hue belong to the class, under noise; its phase is random. uint8 [H, W, 3]."""
    angle = np.pi * label / num_classes
    rows, columns = np.mgrid[: shape[0], : shape[1]] / SIDE
    wave = np.sin(2 * np.pi * (4 * (rows * np.sin(angle) + columns * np.cos(angle)) + rng.random()))  # [H, W]
    tint = np.cos(2 * np.pi * (label / num_classes + np.arange(3) / 3))  # [3]
    image = 128 + 40 * wave[..., None] + 40 * tint + rng.normal(0, 20, (*shape, 3))
    return image.clip(0, 255).astype(np.uint8)
