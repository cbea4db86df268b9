"""The test split that test distributions choose their images from."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from tailtune.configs.errors import UserError
from tailtune.configs.seeding import derive_seed
from tailtune.datasets.long_tail import random_positions, subsample
from tailtune.datasets.sources.image_list import find_list, first_file
from tailtune.datasets.sources.listing import Listing
from tailtune.datasets.sources.published_lists import is_published
from tailtune.datasets.test_distributions.class_order import read_relabelled
from tailtune.datasets.test_distributions.dirichlet import describe_origin
from tailtune.datasets.test_distributions.settings import DistributionSettings

Rows = Callable[[], np.ndarray | None]


class EvaluatedSplit:
    """The test images of an evaluation, from which subsets are chosen.

    Args:
        options: how images are chosen.
        labels: of the test split, as far as `max_test_images` keeps it, int64 [N].
        num_classes: number of classes C.
        rows: gives the position of each image in the test list, int64 [N]; None if it is not known.
    """

    def __init__(self, options: DistributionSettings, labels: np.ndarray, num_classes: int, rows: Rows) -> None:
        self.options, self.labels, self.rows = options, labels, rows
        self.counts = np.bincount(labels, minlength=num_classes)  # images per class, [C]
        self.is_cut = options.max_test_images == len(labels)
        self.missing_lists: list[str] = []
        """List files that say which images to choose, but were not found."""

    def largest_class(self) -> float:
        """Images of the largest class of a long-tailed test distribution.

        A split that is cut by `max_test_images` has about the same share of every class. With a smaller largest class
        the class distribution keeps its shape.
        """
        options = self.options
        mean = max(len(self.labels) / len(self.counts), 1.0)
        if options.shift_max is not None:
            return min(options.shift_max, mean) if self.is_cut else options.shift_max
        return mean if self.is_cut or options.shift_order == "label" else int(self.counts[self.counts > 0].min())

    def choose(self, name: str, wanted: np.ndarray) -> tuple[np.ndarray, str]:
        """Choose images with given class counts.

        Args:
            name: name of the test distribution.
            wanted: images of each class, int64 [C]; a class that has fewer gives all of them.

        Returns:
            Positions in the split, int64 [n]; and a description of how they were chosen.

        Raises:
            UserError: a list file does not fit the test split or the class counts.
        """
        options, note = self.options, ""
        if (wanted >= self.counts).all():
            return np.arange(len(self.labels)), "all test images"
        if options.shift_files and options.test_list:
            name_of_list = options.shift_files.replace("{name}", name)
            if path := first_file(name_of_list, options.folders.for_lists()):
                kind = "published list" if is_published(path) else "list"
                return self._positions_in_list(path, wanted), f"{kind} {path.name}"
            self.missing_lists.append(name_of_list)
            note = f", without the list {name_of_list}"
        counts, by_label = np.minimum(wanted, self.counts), options.shift_order == "label"
        # The published subsets of CIFAR have images in common; for other data every distribution is an own draw.
        seed = options.shift_seed if by_label else derive_seed(options.shift_seed, "shift", name)
        positions = subsample(self.labels, counts.tolist(), seed)
        if by_label and options.shift_seed == 0 and (counts == wanted).all() and not self.is_cut:
            return positions, "the published construction"
        return positions, f"drawn with seed {options.shift_seed}{note}"

    def dirichlet_order(self) -> tuple[np.ndarray, str]:
        """The order in which Dirichlet draws shuffle the images.

        Returns:
            All positions, int64 [N]; and a description of how the images are chosen.

        Raises:
            UserError: the list file does not fit the test split.
        """
        options, positions = self.options, np.arange(len(self.labels))
        list_file = options.dirichlet.list
        name = (list_file or options.test_list) if options.may_have_lists and options.test_list else None
        path = first_file(name, options.folders.for_lists()) if name else None
        if list_file and path:
            positions = self._positions_in_list(path, self.counts)
        elif list_file:
            self.missing_lists.append(list_file)
        is_whole = not self.is_cut and len(set(self.counts.tolist())) == 1
        return positions, describe_origin(options, path, is_whole)

    def _positions_in_list(self, path: Path, wanted: np.ndarray) -> np.ndarray:
        """The positions of a list file's images, after a check of its class counts."""
        listing = read_relabelled(self.options, path)
        positions = listing.positions_in(self._test_list)
        counts = np.bincount(listing.labels, minlength=len(wanted))
        if not self.is_cut and (differing := np.flatnonzero(counts != wanted)).size:
            label = differing[0]
            raise UserError(
                f"{path} has {counts[label]} images of label {label}, but the class counts and shift_… options ask for "
                f"{wanted[label]}; if your training data are not the published ones, set `shift_files none`"
            )
        place = np.full(len(self._test_list.paths), -1)
        place[self._rows] = np.arange(len(self._rows))
        return place[positions[place[positions] >= 0]]

    @cached_property
    def _test_list(self) -> Listing:
        """The whole test list. `max_test_images` may keep only a part of it as the split."""
        assert self.options.test_list
        return read_relabelled(self.options, find_list(self.options.test_list, self.options.folders.for_lists()))

    @cached_property
    def _rows(self) -> np.ndarray:
        """The position of each image in the test list, which a run may have stored in another order, int64 [N]."""
        test_list, rows = self._test_list, self.rows()
        rows = random_positions(len(test_list.paths), self.options.max_test_images) if rows is None else rows
        if rows.max(initial=0) >= len(test_list.paths) or not np.array_equal(test_list.labels[rows], self.labels):
            raise UserError(f"{test_list.file} is not the list of the evaluated images: start over with `resume False`")
        return rows
