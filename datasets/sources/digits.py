"""Handwritten digits that come with scikit-learn: 1,797 grey images of 8×8 pixels, ten classes, no download."""

import numpy as np

from tailtune.datasets.long_tail import hold_out, subsample
from tailtune.datasets.sources.image_sources import ArraySource

_WORDS = "zero one two three four five six seven eight nine"
CLASS_NAMES = tuple(f"digit {word}" for word in _WORDS.split())
TEST_PER_CLASS = 50
TRAIN_PER_CLASS = 128
"""At most; the classes have 124 to 133 images besides the test images."""


def digit_sources() -> tuple[ArraySource, ArraySource]:
    """Training images (up to 128 a class, sorted by class) and a balanced test split of 50 a class."""
    from sklearn.datasets import load_digits  # takes seconds to import, and only these data need it

    bunch = load_digits()
    values = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # [N, 8, 8], values 0…16
    images = np.repeat(values[..., None], 3, axis=-1)  # [N, 8, 8, 3]
    test, rest = hold_out(bunch.target, TEST_PER_CLASS, CLASS_NAMES, "test_per_class")
    counts = np.bincount(bunch.target[rest]).clip(max=TRAIN_PER_CLASS)
    train = rest[subsample(bunch.target[rest], counts.tolist())]
    return (
        ArraySource(images[train], bunch.target[train], "digits train"),
        ArraySource(images[test], bunch.target[test], "digits test"),
    )
