"""What a data set offers before splits are chosen: facts about it, and its images."""

from dataclasses import dataclass

from tailtune.datasets.sources.image_sources import Source

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Outline:
    """What is known of a data set before its images are there."""

    class_names: tuple[str, ...]
    available: list[int]
    """Images per class that may be trained on, before any subsampling, [C]."""
    mean: Triple
    std: Triple


@dataclass(frozen=True)
class AvailableImages:
    """The images that there are, before subsets and hold-outs (datasets/splits/choose_splits.py)."""

    outline: Outline
    train: Source
    test: Source | None
    """None where the test images are held out of those for training."""
    val: Source | None = None
