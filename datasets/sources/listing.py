"""Paths and labels of images, as a list file or the folders name them; no image is opened."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tailtune.configs.errors import UserError
from tailtune.datasets.sources.image_sources import FileSource
from tailtune.datasets.sources.known_layouts import archived_places_path, paths_on_disk
from tailtune.datasets.sources.path_list import PathList


@dataclass(frozen=True)
class Listing:
    """N labelled images of one split."""

    file: Path | None
    """The list file; None if folders were read."""
    paths: PathList
    """N paths relative to the image folder."""
    labels: np.ndarray
    """int64 [N]."""
    lines: Sequence[int] | np.ndarray
    """Number of each image's line in the list file, [N]; empty if folders were read."""

    def source(self, root: Path) -> FileSource:
        """The images below a folder, as `files`, after a check that the folder holds them.

        Args:
            root: the folder that the paths start from.

        Raises:
            MissingData: the folder does not exist, or does not hold the images.
        """
        source = self.files(root)
        source.check_root()
        return source

    def files(self, root: Path) -> FileSource:
        """The images below a folder; nothing is checked.

        The paths are converted to the layout of Places365 or ImageNet that the folder has.

        Args:
            root: the folder that the paths start from.
        """
        paths = paths_on_disk(root, self.paths)
        return FileSource(root, paths, self.labels, self.file, self.lines)

    def positions_in(self, whole: "Listing") -> np.ndarray:
        """The positions of these images in another list. Either list may use any layout of Places365.

        Args:
            whole: a list that contains all images of this one.

        Returns:
            int64 [N].

        Raises:
            UserError: an image is not in the other list, or occurs twice in this one.
        """
        position_of = {image: position for position, image in enumerate(whole._images())}
        positions: dict[int, None] = {}
        for number, image in enumerate(self._images()):
            position = position_of.get(image)
            if position is None or position in positions:
                reason = "is listed twice" if position in positions else f"with this label is not in {whole.file}"
                raise UserError(f"{self.file} line {self.lines[number]}: {self.paths[number]} {reason}")
            positions[position] = None
        return np.array([*positions], dtype=np.int64)

    def _images(self) -> list[tuple[str, int]]:
        labels = self.labels.tolist()
        return [(archived_places_path(path), label) for path, label in zip(self.paths, labels, strict=True)]

    def relabel(self, new_label: np.ndarray) -> "Listing":
        """The same images with other labels.

        Args:
            new_label: label in this list → new label, int64 [L].

        Raises:
            UserError: a label is outside 0 … L − 1.
        """
        self.check_labels(len(new_label))
        return Listing(self.file, self.paths, new_label[self.labels], self.lines)

    def check_labels(self, num_classes: int) -> None:
        """Check that every label is in 0 … num_classes − 1.

        Args:
            num_classes: number of classes.

        Raises:
            UserError: a label is outside; the message names file and line.
        """
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= num_classes))
        if len(wrong):
            first = wrong[0]
            line = f"{self.file} line {self.lines[first]}"
            valid = f"0 … {num_classes - 1}"
            raise UserError(f"{line}: label {self.labels[first]} is not in {valid}: correct it, or set `num_classes`")
