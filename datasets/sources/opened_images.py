"""`OpenedImages`: images that a program has opened with Pillow."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image

from tailtune.datasets.images.image_files import DecodeError, decode_errors, upright_rgb
from tailtune.datasets.images.tensor_decode import pixels_of
from tailtune.datasets.sources.named_source import BadImage

if TYPE_CHECKING:
    from torch import Tensor


class OpenedImages:
    """A `Source` of Pillow's images. Only one process may load them, because they may share an open file.

    Args:
        images: N images of any mode. One whose EXIF data say that it is turned is rotated in place.
    """

    def __init__(self, images: Sequence[Image.Image]) -> None:
        self.images = images
        self.labels = np.zeros(len(images), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image.Image:
        """As `Source.load`. An image whose file is damaged fails here, because Pillow reads pixels late."""
        with self._located(index):
            return upright_rgb(self.images[index])

    def open(self, index: int) -> None:
        """As `Source.open`: the images are open already."""

    def pixels(self, index: int, file: BinaryIO | None) -> "Tensor":
        """As `Source.pixels`."""
        return pixels_of(self.load(index))

    def location(self, index: int) -> str:
        """As `Source.location`: the path of the file, if there is one, and the position."""
        path = getattr(self.images[index], "filename", "")
        return f"{path} (image {index})" if path else f"image {index}"

    def stamp(self, index: int) -> str:
        """As `Source.stamp`: the pixels themselves."""
        return hashlib.blake2b(self.load(index).tobytes(), digest_size=16).hexdigest()

    @contextmanager
    def _located(self, index: int) -> Iterator[None]:
        try:
            with decode_errors():
                yield
        except DecodeError as problem:
            raise BadImage(f"cannot read {self.location(index)}: {problem}") from problem
