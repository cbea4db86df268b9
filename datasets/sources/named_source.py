"""`NamedSource`: images that have a path and a size each, and that can change between two runs."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from PIL import Image

from tailtune.datasets.images.image_files import Inspection
from tailtune.datasets.sources.path_list import PathList


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
    def load(self, index: int) -> Image.Image:
        """As `Source.load`."""

    @abstractmethod
    def decode(self, index: int) -> Image.Image:
        """As `Source.load`, without the location in the message.

        Args:
            index: position in the source.

        Raises:
            DecodeError: the image is missing or cannot be decoded.
        """

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The encoded image, as it is stored.

        Args:
            index: position in the source.

        Raises:
            BadImage: it is missing or damaged. An image file is not looked into.
        """

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
