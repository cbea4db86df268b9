"""What the rest of the toolkit sees of a data set: facts and views."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from tailtune.configs.seeding import seeded
from tailtune.datasets.images.transforms import Transform
from tailtune.datasets.long_tail import some_positions
from tailtune.datasets.sources.available_images import Triple
from tailtune.datasets.sources.image_sources import BadImage, Source
from tailtune.datasets.splits.split_records import ChosenSplits, Record

Batch = dict[str, Any]
PADDING = -1


@dataclass(frozen=True)
class DataInfo:
    """Facts that need no image."""

    name: str
    class_names: tuple[str, ...]
    class_counts: torch.Tensor
    """Training images per class, int64 [C]."""
    groups: dict[str, torch.Tensor]
    """`many`, `med`, `few` → class indices, int64."""
    mean: Triple
    std: Triple
    """Of the data set's own pixels (0–1), for a backbone that has none."""
    descriptors: tuple[tuple[str, ...], ...] | None = None
    """Strings that describe each class [C], where `prompt descriptor` asks for them."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True)
class Shift:
    """A test set of other class frequencies."""

    name: str
    counts: torch.Tensor
    """Images per class, int64 [C]."""
    positions: torch.Tensor
    """Its images in the test split, int64 [n]."""
    origin: str
    """Where the choice of images comes from, for people."""
    learn: torch.Tensor | None = None
    """Images that weights for it are learnt from, as `positions`; None: its own."""


class View(Dataset[Batch]):
    """Some images of a source, seen through a transform.

    Keys: an index in the view, or (index, epoch), or (index, epoch, view). What the transform draws is a function
    of the seed and the key alone, whatever worker or process runs it; an index alone is (index, 0, 0). The index -1
    is padding, not the last image: a black image of weight 0. (index, epoch, view, index, view) is a pair.

    A sample is `image` (uint8 [3, H, W]), `label`, `index` (the position in the view) and `weight`: 1.0, or 0.0 for
    padding and for a bad image when those are skipped. Of a pair all is of the first image, and `partner` is the
    second; the weight is 0 if either is bad.

    Args:
        source: the images.
        indices: positions in the source, int64 [N].
        transform: PIL image → uint8 [3, H, W].
        seed: of the augmentation.
        skip_bad: give unreadable images weight 0 instead of raising `BadImage`.
    """

    def __init__(
        self, source: Source, indices: np.ndarray, transform: Transform, seed: int = 0, skip_bad: bool = False
    ):
        self.source, self.indices, self.transform = source, indices, transform
        self.seed, self.skip_bad = seed, skip_bad

    @property
    def labels(self) -> torch.Tensor:
        """Classes in the order of the view, int64 [N]."""
        return torch.from_numpy(self.source.labels[self.indices])

    def with_transform(self, transform: Transform) -> "View":
        """The same images through another transform."""
        return View(self.source, self.indices, transform, self.seed, self.skip_bad)

    def limited(self, count: int | None) -> "View":
        """At most `count` of the images, spread at random over the split, whose order may be by class."""
        if count is None:
            return self
        return self.take(some_positions(len(self.indices), count))

    def take(self, positions: np.ndarray) -> "View":
        """The images at these positions of the view."""
        return View(self.source, self.indices[positions], self.transform, self.seed, self.skip_bad)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | tuple[int, ...]) -> Batch:
        if isinstance(key, tuple) and len(key) == 5:
            first, second = self[key[:3]], self[key[3], key[1], key[4]]
            return {**first, "partner": second["image"], "weight": min(first["weight"], second["weight"])}
        index, epoch, view = (*key, 0, 0)[:3] if isinstance(key, tuple) else (key, 0, 0)
        if index == PADDING:
            return _sample(self._black(), 0, PADDING, 0.0)
        position = int(self.indices[index])
        label = int(self.source.labels[position])
        try:
            image = self.source.load(position)
        except BadImage:
            if not self.skip_bad:
                raise
            return _sample(self._black(), label, index, 0.0)
        with seeded(self.seed, "augment", epoch, index, view):
            return _sample(self.transform(image), label, index, 1.0)

    def _black(self) -> torch.Tensor:
        """Zeros of the shape that the transform gives to a square image, which is what stacks with others."""
        with seeded(0):
            return torch.zeros_like(self.transform(Image.new("RGB", (32, 32))))


@dataclass
class DataBundle:
    """The views of a run."""

    info: DataInfo
    train: View
    """Augmented."""
    plain: View
    """Training images through the plain transform, for head initialisation."""
    train_as_test: View
    """Training images through the test transform, for `test_train`."""
    test: View
    test_views: View
    """Test images, two draws of the views that test-time learning compares: `image` is uint8 [2, 3, H, W]."""
    val: View | None
    records: Mapping[str, Record]
    """What each split is made of: `train`, `test`, and `val` where there is one."""
    chosen: ChosenSplits
    """The splits, and the images that are in none."""
    shifts: tuple[Shift, ...] = ()
    """Label distributions of the test images."""


def _sample(image: torch.Tensor, label: int, index: int, weight: float) -> Batch:
    return {"image": image, "label": label, "index": index, "weight": weight}
