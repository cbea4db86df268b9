"""What the rest of the toolkit sees of a data set: facts about it, its views, and its test distributions."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tailtune.datasets.sources.available_images import RGB
from tailtune.datasets.splits.split_records import ChosenSplits, Record
from tailtune.datasets.view import View


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
    counts_before_cap: torch.Tensor | None = None
    """Training images per class before `subset_cap` cut them, int64 [C]; None: nothing cut them."""

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_names)

    @property
    def natural_counts(self) -> torch.Tensor:
        """Training images per class that say how frequent the classes are, int64 [C]: not cut by `subset_cap`."""
        return self.class_counts if self.counts_before_cap is None else self.counts_before_cap


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
    val_in_training: View | None
    """The same for validation during training, which no option of the test changes where it chooses an epoch."""
    records: Mapping[str, Record]
    """Split (`train`, `test`, and `val` if there is one) → the files that it is made of."""
    splits: ChosenSplits
    """The images of each split, and those in no split."""
    test_distributions: tuple[TestDistribution, ...] = ()
    """The test distributions that the run is evaluated on."""
