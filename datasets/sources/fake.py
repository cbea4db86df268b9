"""Generated images that a model learns in seconds, for tests and for a first run without any data."""

import numpy as np

from tailtune.configs.errors import UserError
from tailtune.configs.seeding import derive_seed
from tailtune.datasets.sources.image_sources import ArraySource

TRAIN_PER_CLASS, TEST_PER_CLASS = 40, 10
MAX_CLASSES = 1000
"""All images are generated at every start (5 ms per class) and held in memory."""
SIDE = 32
"""Height and width of most images in pixels."""
OTHER_SIZES = {3: (32, 44), 5: (40, 32)}
"""Number of an image in its class → its size (H, W), for the images that are not square."""


def check_num_classes(num_classes: int) -> None:
    """Check that the images of all classes can be held in memory.

    Args:
        num_classes: number of classes.

    Raises:
        UserError: there are more than `MAX_CLASSES`.
    """
    if num_classes > MAX_CLASSES:
        raise UserError(f"num_classes {num_classes}: dataset Fake generates at most {MAX_CLASSES} classes")


def fake_sources(num_classes: int) -> tuple[ArraySource, ArraySource]:
    """Training images (40 per class) and test images (10 per class), sorted by class; always the same ones.

    Args:
        num_classes: number of classes C.

    Returns:
        Training and test images.
    """
    return (
        _fake_split(num_classes, TRAIN_PER_CLASS, "train"),
        _fake_split(num_classes, TEST_PER_CLASS, "test"),
    )


def _fake_split(num_classes: int, per_class: int, split: str) -> ArraySource:
    random = np.random.default_rng(derive_seed("fake", split))
    labels = np.repeat(np.arange(num_classes), per_class)
    images = [
        _fake_image(int(label), num_classes, OTHER_SIZES.get(i % per_class, (SIDE, SIDE)), random)
        for i, label in enumerate(labels)
    ]
    return ArraySource(images, labels, f"fake {split}")


def _fake_image(label: int, num_classes: int, shape: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """Noisy stripes with a random phase, whose direction and hue depend on the class; uint8 [H, W, 3]."""
    angle = np.pi * label / num_classes
    rows, columns = np.mgrid[: shape[0], : shape[1]] / SIDE
    wave = np.sin(2 * np.pi * (4 * (rows * np.sin(angle) + columns * np.cos(angle)) + random.random()))  # [H, W]
    tint = np.cos(2 * np.pi * (label / num_classes + np.arange(3) / 3))  # [3]
    image = 128 + 40 * wave[..., None] + 40 * tint + random.normal(0, 20, (*shape, 3))
    return image.clip(0, 255).astype(np.uint8)
