"""`NamedSource`: images that have a path and a size each, and that can change between two runs."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image

from tailtune.configs.errors import UserError
from tailtune.datasets.images.image_files import DecodeError, decode_errors, decode_rgb
from tailtune.datasets.images.inspect_files import Inspection
from tailtune.datasets.images.tensor_decode import decode_pixels
from tailtune.datasets.sources.path_list import PathList

if TYPE_CHECKING:
    from torch import Tensor


class BadImage(UserError):
    """An image of the data is missing or cannot be decoded."""


class MissingData(UserError):
    """A list file or the folder of the images does not exist."""


class NamedSource(ABC):
    """A `Source` whose images are stored outside the program: as files, or in shards.

    A run stores paths, labels and sizes of its images, and compares them when it is continued or evaluated.
    """

    paths: PathList
    """Path of each image, by which a run knows it again, [N]."""
    labels: np.ndarray
    """Class of each image, int64 [N]."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def location(self, index: int) -> str:
        """As `Source.location`."""

    @abstractmethod
    def file(self, index: int) -> BinaryIO:
        """The encoded image, usually read into memory.

        Args:
            index: position in the source.

        Raises:
            DecodeError: it is missing or cannot be read. The message is without the location.
        """

    @abstractmethod
    def stamp(self, index: int) -> str:
        """As `Source.stamp`."""

    def decode(self, index: int) -> Image.Image:
        """As `Source.load`, without the location in the message.

        Args:
            index: position in the source.

        Raises:
            DecodeError: the image is missing or cannot be decoded.
        """
        with self.file(index) as file:
            return decode_rgb(file)

    def load(self, index: int) -> Image.Image:
        """As `Source.load`."""
        with self._located(index):
            return self.decode(index)

    def open(self, index: int) -> BinaryIO:
        """As `Source.open`."""
        with self._located(index):
            return self.file(index)

    def pixels(self, index: int, file: BinaryIO | None) -> "Tensor":
        """As `Source.pixels`."""
        assert file is not None
        with file, self._located(index):
            return decode_pixels(file)

    def encoded(self, index: int) -> bytes:
        """The encoded image, as it is stored.

        Args:
            index: position in the source.

        Raises:
            BadImage: it is missing or damaged. An image file is not looked into.
        """
        with self._located(index), self.file(index) as file, decode_errors():
            return file.read()

    @contextmanager
    def _located(self, index: int) -> Iterator[None]:
        """Raise a `BadImage` with the location of an image in place of a `DecodeError`."""
        try:
            yield
        except DecodeError as problem:
            raise BadImage(f"cannot read image {self.location(index)}: {problem}") from problem

    @abstractmethod
    def inspect(self, indices: np.ndarray, read_headers: bool) -> Inspection:
        """Check images without decoding them.

        Args:
            indices: positions in the source, int64 [n].
            read_headers: read the first bytes of each file. Images in shards were looked at when they were indexed.

        Returns:
            Sizes and problems; positions are those in `indices`.
        """

    @abstractmethod
    def has(self, path: str) -> bool:
        """Whether the image of a path is there.

        Args:
            path: as in `paths`, though it may be of no image of this source.
        """

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The encoded image of a path.

        Args:
            path: as for `has`.

        Raises:
            OSError: it is not there or cannot be read.
        """

    def sha256(self, index: int) -> str:
        """SHA-256 of the encoded image, in hexadecimal digits.

        Args:
            index: position in the source.

        Raises:
            BadImage: as `encoded`.
        """
        return hashlib.sha256(self.encoded(index)).hexdigest()

    def prefetch(self, indices: Sequence[int]) -> None:
        """Read the encoded images of a batch at the same time, if each of them would be waited for.

        Args:
            indices: positions in the source. They replace those of the call before.

        Raises:
            MissingData: the server of the images does not answer.
        """
        del indices
