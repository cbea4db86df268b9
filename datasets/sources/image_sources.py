"""Where images come from: files or arrays, always RGB PIL images with an integer label."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from tailtune.configs.errors import UserError
from tailtune.datasets.images.image_files import BadPicture, load_rgb


class BadImage(UserError):
    """An image that is missing or cannot be decoded."""


class MissingData(UserError):
    """A list file, or the folder of the images, is not there."""


class Source(Protocol):
    """A set of labelled images."""

    @property
    def labels(self) -> np.ndarray:
        """Class of every image, int64 [N]."""

    def __len__(self) -> int:
        """Number of images."""

    def load(self, index: int) -> Image.Image:
        """The image in RGB. Raises `BadImage`."""

    def where(self, index: int) -> str:
        """Where the image comes from, for messages."""


class ArraySource:
    """Images in memory.

    Args:
        images: uint8 arrays [H, W, 3]; one array [N, H, W, 3], or a sequence where sizes differ.
        labels: [N].
        name: what the images are, for messages.
    """

    def __init__(self, images: Sequence[np.ndarray] | np.ndarray, labels: Sequence[int] | np.ndarray, name: str):
        self.images = images
        self.labels = np.asarray(labels, dtype=np.int64)
        self.name = name

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def where(self, index: int) -> str:
        return f"image {index} of {self.name}"


class FileSource:
    """Image files below a folder.

    Args:
        root: folder that the paths start from.
        paths: N relative paths.
        labels: [N].
        listed_in: the list file that names them, if one does.
        lines: the line in that file, [N].
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        labels: Sequence[int] | np.ndarray,
        listed_in: Path | None = None,
        lines: Sequence[int] = (),
    ):
        self.root, self.paths, self.listed_in, self.lines = root, paths, listed_in, lines
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Image.Image:
        try:
            return load_rgb(self.root / self.paths[index])
        except BadPicture as problem:
            raise BadImage(f"cannot read image {self.where(index)}: {problem}") from problem

    def where(self, index: int) -> str:
        path = self.root / self.paths[index]
        return f"{path} (line {self.lines[index]} of {self.listed_in})" if self.listed_in else str(path)

    def check_root(self) -> None:
        """Refuse a wrong `root` before anything is built; single missing images are `load`'s matter.

        Raises:
            UserError: the folder, or each one of some images spread over the source, is missing.
        """
        if not self.root.is_dir():
            raise MissingData(
                f"image folder not found: {self.root.absolute()} (set `root` to the folder of the images)"
            )
        sample = range(0, len(self), max(1, len(self) // 16))
        if not any((self.root / self.paths[index]).is_file() for index in sample):
            raise MissingData(f"image not found: {self.where(0)} (set `root` to the folder that its paths start from)")
