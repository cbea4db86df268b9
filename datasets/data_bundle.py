"""What the rest of the toolkit sees of a data set: facts about it, its views, and its test distributions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from tailtune.configs.seeding import seeded
from tailtune.datasets.images.transforms import Transform
from tailtune.datasets.long_tail import random_positions
from tailtune.datasets.sources.available_images import RGB
from tailtune.datasets.sources.image_sources import BadImage, Source
from tailtune.datasets.sources.named_source import NamedSource
from tailtune.datasets.splits.split_records import ChosenSplits, Record

Batch = dict[str, Any]
"""A sample of a `View`, or a batch of samples as `collate` joins them: name → value."""
PADDING = -1
"""Index of a black image of weight 0."""


@dataclass(frozen=True)
class DataInfo:
    """Facts about the training data that need no image."""

    name: str
    """Name of the data config."""
    class_names: tuple[str, ...]
    """C names in the order of the labels."""
    class_counts: torch.Tensor
    """Training images per class, int64 [C]."""
    groups: dict[str, torch.Tensor]
    """Shot group (`many`, `med`, `few`) → its class indices, int64."""
    mean: RGB
    """Mean of the data set's pixels (0–1), for a backbone that has no mean of its own."""
    std: RGB
    """Standard deviation of the data set's pixels (0–1), for the same use."""
    descriptors: tuple[tuple[str, ...], ...] | None = None
    """Texts that describe each class [C], if the option `prompt descriptor` needs them."""

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_names)


@dataclass(frozen=True)
class TestDistribution:
    """A subset of the test images with given class frequencies, such as `forward50`."""

    __test__ = False  # pytest shall not collect this class as a test

    name: str
    counts: torch.Tensor
    """Images per class, int64 [C]."""
    positions: torch.Tensor
    """Positions of its n images in the test split, int64 [n]."""
    origin: str
    """How the images were chosen, for reports."""
    learn_positions: torch.Tensor | None = None
    """Test images from which test-time adaptation learns, as `positions`; None: from the images of `positions`."""


class View(Dataset[Batch]):
    """Images of a source, seen through a transform.

    A key is an index in the view, (index, epoch) or (index, epoch, number of the repetition). An index alone means
    (index, 0, 0). The random draws of the transform depend on the seed and the key only, not on the process that runs
    it. The index `PADDING` gives a black image of weight 0. A key of five numbers, (index, epoch, repetition, index,
    repetition), is a pair of images.

    A sample has `image` (uint8 [3, H, W]), `label`, `index` (the position in the view) and `weight`. The weight is 1.0,
    or 0.0 for padding and for an unreadable image that is skipped. The sample of a pair describes the first image, has
    the second one as `partner`, and has weight 0 if one of the two has.

    Args:
        source: the images.
        indices: positions in the source, int64 [N].
        transform: PIL image → uint8 [3, H, W].
        seed: seed of the transform's random draws.
        skip_bad: give unreadable images weight 0 instead of raising `BadImage`.
    """

    def __init__(
        self, source: Source, indices: np.ndarray, transform: Transform, seed: int = 0, skip_bad: bool = False
    ):
        self.source, self.indices, self.transform = source, indices, transform
        self.seed, self.skip_bad = seed, skip_bad

    @property
    def labels(self) -> torch.Tensor:
        """Labels of the images in the order of the view, int64 [N]."""
        return torch.from_numpy(self.source.labels[self.indices])

    def limited(self, count: int | None) -> "View":
        """At most `count` images of the view, chosen at random because the view may be sorted by class.

        Args:
            count: number of images; None for all.
        """
        if count is None:
            return self
        return self.take(random_positions(len(self.indices), count))

    def take(self, positions: np.ndarray) -> "View":
        """The images at the given positions of the view.

        Args:
            positions: int64 [n].
        """
        return View(self.source, self.indices[positions], self.transform, self.seed, self.skip_bad)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | tuple[int, ...]) -> Batch:
        """The sample of a key.

        Raises:
            BadImage: the image cannot be read, and unreadable images are not skipped.
        """
        if isinstance(key, tuple) and len(key) == 5:
            first, second = self[key[:3]], self[key[3], key[1], key[4]]
            return {**first, "partner": second["image"], "weight": min(first["weight"], second["weight"])}
        index, epoch, repetition = (*key, 0, 0)[:3] if isinstance(key, tuple) else (key, 0, 0)
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
        with seeded(self.seed, "augment", epoch, index, repetition):
            return _sample(self.transform(image), label, index, 1.0)

    def __getitems__(self, keys: Sequence[int | tuple[int, ...]]) -> list[Batch]:
        """The samples of a batch; a DataLoader calls it with all keys of a batch, so that shards are read at once.

        Raises:
            BadImage: as `__getitem__`.
            MissingData: the server of the images does not answer.
        """
        if isinstance(self.source, NamedSource):
            parts = (key if isinstance(key, tuple) else (key,) for key in keys)
            indices = [index for part in parts for index in part[::3]]  # of a pair, the two images
            self.source.prefetch([int(self.indices[index]) for index in indices if index != PADDING])
        return [self[key] for key in keys]

    def _black(self) -> torch.Tensor:
        """A black image of the shape that the transform gives to a square image, so that batches can be stacked."""
        with seeded(0):
            return torch.zeros_like(self.transform(Image.new("RGB", (32, 32))))


@dataclass
class DataBundle:
    """Everything about the data that a run uses."""

    info: DataInfo
    train: View
    """Training images with augmentation."""
    train_unaugmented: View
    """Training images resized and cropped at the centre, for initialising the head."""
    train_as_test: View
    """Training images with the transform of the test, for the option `test_train`."""
    test: View
    """Test images."""
    test_views: View
    """Test images, two augmented views of each: `image` is uint8 [2, 3, H, W]. Test-time adaptation compares them."""
    val: View | None
    """Validation images, if there are any."""
    records: Mapping[str, Record]
    """Split (`train`, `test`, and `val` if there is one) → the files that it is made of."""
    splits: ChosenSplits
    """The images of each split, and those in no split."""
    test_distributions: tuple[TestDistribution, ...] = ()
    """The test distributions that the run is evaluated on."""


def _sample(image: torch.Tensor, label: int, index: int, weight: float) -> Batch:
    return {"image": image, "label": label, "index": index, "weight": weight}
