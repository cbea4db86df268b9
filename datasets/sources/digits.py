"""Handwritten digits from scikit-learn: 1,797 grey images of 8×8 pixels in ten classes, without any download."""

import numpy as np

from tailtune.datasets.long_tail import hold_out, subsample
from tailtune.datasets.sources.image_sources import ArraySource

_WORDS = "zero one two three four five six seven eight nine"
CLASS_NAMES = tuple(f"digit {word}" for word in _WORDS.split())
TEST_PER_CLASS = 50
TRAIN_PER_CLASS = 128
"""Most training images of a class. Without the test images the classes have 124 to 133 images."""


def digit_sources() -> tuple[ArraySource, ArraySource]:
    """The training images (up to 128 per class, sorted by class) and the test images (50 per class)."""
    from sklearn.datasets import load_digits  # imported here because it takes seconds

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # [N, 8, 8]; scikit-learn's values are 0 … 16
    images = np.repeat(pixels[..., None], 3, axis=-1)  # [N, 8, 8, 3]
    test, rest = hold_out(digits.target, TEST_PER_CLASS, CLASS_NAMES, "test_per_class")
    counts = np.bincount(digits.target[rest]).clip(max=TRAIN_PER_CLASS)
    train = rest[subsample(digits.target[rest], counts.tolist())]
    return (
        ArraySource(images[train], digits.target[train], "digits train"),
        ArraySource(images[test], digits.target[test], "digits test"),
    )
