"""Sources of labelled images, in files or in memory. Every source gives RGB images of PIL and integer labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from tailtune.configs.errors import UserError
from tailtune.datasets.images.image_files import DecodeError, Inspection, inspect_files, load_rgb, open_file
from tailtune.datasets.sources.named_source import NamedSource
from tailtune.datasets.sources.path_list import PathList


class BadImage(UserError):
    """An image of the data is missing or cannot be decoded."""


class MissingData(UserError):
    """A list file or the folder of the images does not exist."""


class Source(Protocol):
    """A sequence of labelled images."""

    @property
    def labels(self) -> np.ndarray:
        """Class of every image, int64 [N]."""

    def __len__(self) -> int:
        """Number of images N."""

    def load(self, index: int) -> Image.Image:
        """The image at a position, in mode RGB.

        Args:
            index: position in the source.

        Raises:
            BadImage: it is missing or cannot be decoded.
        """

    def location(self, index: int) -> str:
        """Where an image comes from, for messages.

        Args:
            index: position in the source.
        """


class ArraySource:
    """Images in memory.

    Args:
        images: uint8 [N, H, W, 3], or a sequence of N arrays [H, W, 3] if their sizes differ.
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
        """As `Source.load`; it never fails."""
        return Image.fromarray(self.images[index])

    def location(self, index: int) -> str:
        """As `Source.location`."""
        return f"image {index} of {self.name}"


class FileSource(NamedSource):
    """Image files below a folder.

    Args:
        root: folder that the paths start from.
        paths: N relative paths.
        labels: [N].
        listed_in: the list file that contains the paths, if there is one.
        lines: number of each path's line in that file, [N].
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        labels: Sequence[int] | np.ndarray,
        listed_in: Path | None = None,
        lines: Sequence[int] | np.ndarray = (),
    ):
        self.root, self.listed_in, self.lines = root, listed_in, lines
        self.paths = paths if isinstance(paths, PathList) else PathList(paths)
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Image.Image:
        """As `Source.load`."""
        try:
            return load_rgb(self.root / self.paths[index])
        except DecodeError as problem:
            raise BadImage(f"cannot read image {self.location(index)}: {problem}") from problem

    def location(self, index: int) -> str:
        """As `Source.location`: the path, and the line of the list file."""
        path = self.root / self.paths[index]
        return f"{path} (line {self.lines[index]} of {self.listed_in})" if self.listed_in else str(path)

    def decode(self, index: int) -> Image.Image:
        """As `NamedSource.decode`."""
        return load_rgb(self.root / self.paths[index])

    def encoded(self, index: int) -> bytes:
        """As `NamedSource.encoded`."""
        try:
            with open_file(self.root / self.paths[index]) as (file, _):
                return file.read()
        except (DecodeError, OSError) as problem:
            raise BadImage(f"cannot read image {self.location(index)}: {problem}") from problem

    def inspect(self, indices: np.ndarray, read_headers: bool) -> Inspection:
        """As `NamedSource.inspect`."""
        return inspect_files([self.root / path for path in self.paths.at(indices)], read_headers)

    def has(self, path: str) -> bool:
        """As `NamedSource.has`."""
        return (self.root / path).exists()

    def read(self, path: str) -> bytes:
        """As `NamedSource.read`."""
        return (self.root / path).read_bytes()

    def check_root(self) -> None:
        """Check whether `root` is the folder of these images. Single missing files are not looked for.

        Raises:
            MissingData: the folder does not exist, or none of about 16 files of the source does.
        """
        if not self.root.is_dir():
            raise MissingData(
                f"image folder not found: {self.root.absolute()} (set `root` to the folder of the images)"
            )
        sample = range(0, len(self), max(1, len(self) // 16))
        if not any((self.root / self.paths[index]).is_file() for index in sample):
            raise MissingData(
                f"image not found: {self.location(0)} (set `root` to the folder that its paths start from)"
            )
