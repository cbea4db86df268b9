"""Handwritten digits from scikit-learn: 1,797 grey images of 8×8 pixels in ten classes, without any download."""

from importlib.util import find_spec
from pathlib import Path

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
    grey, labels = digit_images()
    pixels = np.rint(grey * (255 / 16)).astype(np.uint8)  # [N, 8, 8]
    images = np.repeat(pixels[..., None], 3, axis=-1)  # [N, 8, 8, 3]
    test, rest = hold_out(labels, TEST_PER_CLASS, CLASS_NAMES, "test_per_class")
    counts = np.bincount(labels[rest]).clip(max=TRAIN_PER_CLASS)
    train = rest[subsample(labels[rest], counts.tolist())]
    return (
        ArraySource(images[train], labels[train], "digits train"),
        ArraySource(images[test], labels[test], "digits test"),
    )


def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """The images (values 0 … 16, float64 [N, 8, 8]) and labels (int64 [N]) of `sklearn.datasets.load_digits`.

    The file is read without scikit-learn, whose import takes longer than all other work of a small run.
    """
    package = find_spec("sklearn")
    assert package is not None and package.origin is not None
    rows = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")  # [N, 65]
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)
