"""What a data set offers before its splits are chosen: facts about it, and its images."""

from dataclasses import dataclass

from tailtune.datasets.sources.image_sources import Source

RGB = tuple[float, float, float]
"""One number for each of red, green and blue."""


@dataclass(frozen=True)
class Outline:
    """Facts about a data set that are known before its images are read."""

    class_names: tuple[str, ...]
    """C names in the order of the labels."""
    available: list[int]
    """Images per class that training may use, before a long-tailed subset is taken, [C]."""
    mean: RGB
    """Mean of the pixels (0–1)."""
    std: RGB
    """Standard deviation of the pixels (0–1)."""


@dataclass(frozen=True)
class AvailableImages:
    """All images of a data set, before datasets/splits/choose_splits.py takes subsets and holds images out."""

    outline: Outline
    train: Source
    test: Source | None
    """None if test images are to be held out of the training images."""
    val: Source | None = None
    """None if there are no validation images of their own."""
