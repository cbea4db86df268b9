"""Sources of labelled images, in files or in memory. Every source gives RGB images of PIL and integer labels."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import numpy as np
from PIL import Image

from tailtune.configs.lazy_module import lazy_module
from tailtune.datasets.images.image_files import read_file
from tailtune.datasets.images.inspect_files import Inspection, inspect_files
from tailtune.datasets.sources.named_source import MissingData, NamedSource
from tailtune.datasets.sources.path_list import PathList

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy_module("torch")


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

    def open(self, index: int) -> BinaryIO | None:
        """Read the encoded image at a position, so that the time of reading and of decoding can be told apart.

        Args:
            index: position in the source.

        Returns:
            The file, to be decoded by `pixels`; None for images that are not encoded.

        Raises:
            BadImage: it is missing or cannot be read.
        """

    def pixels(self, index: int, file: BinaryIO | None) -> "Tensor":
        """The image at a position as a tensor.

        Args:
            index: position in the source.
            file: what `open` has returned; it is closed.

        Returns:
            RGB, uint8 [3, H, W]. It must not be changed.

        Raises:
            BadImage: it cannot be decoded.
        """

    def location(self, index: int) -> str:
        """Where an image comes from, for messages.

        Args:
            index: position in the source.
        """

    def stamp(self, index: int) -> str:
        """A text that changes when the image may have changed, by which a cache of decoded images is found again.

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

    def open(self, index: int) -> None:
        """As `Source.open`: the images are not encoded."""

    def pixels(self, index: int, file: BinaryIO | None) -> "Tensor":
        """As `Source.pixels`; it never fails."""
        return torch.from_numpy(self.images[index]).permute(2, 0, 1)

    def stack(self) -> "Tensor | None":
        """All images as one tensor [N, 3, H, W] that shares their memory; None if their sizes differ."""
        return torch.from_numpy(self.images).permute(0, 3, 1, 2) if isinstance(self.images, np.ndarray) else None

    def location(self, index: int) -> str:
        """As `Source.location`."""
        return f"image {index} of {self.name}"

    def stamp(self, index: int) -> str:
        """As `Source.stamp`: the pixels themselves."""
        return hashlib.blake2b(np.ascontiguousarray(self.images[index]).data, digest_size=16).hexdigest()


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

    def file(self, index: int) -> BinaryIO:
        """As `NamedSource.file`."""
        return read_file(self.root / self.paths[index])

    def location(self, index: int) -> str:
        """As `Source.location`: the path, and the line of the list file."""
        path = self.root / self.paths[index]
        return f"{path} (line {self.lines[index]} of {self.listed_in})" if self.listed_in else str(path)

    def stamp(self, index: int) -> str:
        """As `NamedSource.stamp`: path, size and time of the last change."""
        path = self.root / self.paths[index]
        try:
            status = path.stat()
        except OSError:
            return f"{path} missing"
        return f"{path.absolute()} {status.st_size} {status.st_mtime_ns}"

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
