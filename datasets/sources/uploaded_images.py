"""`UploadedImages`: encoded images that a program has received, and that have no path."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image

from tailtune.datasets.images.image_files import DecodeError, decode_errors, decode_rgb
from tailtune.datasets.images.tensor_decode import decode_pixels
from tailtune.datasets.sources.named_source import BadImage

if TYPE_CHECKING:
    from torch import Tensor


class UploadedImages:
    """Images in open files. They are decoded as those of a `FileSource`, so the pixels are the same.

    Args:
        files: N files that can be read from any position. They stay open.
    """

    def __init__(self, files: Sequence[BinaryIO]) -> None:
        self.files = files
        self.labels = np.zeros(len(files), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> Image.Image:
        """As `Source.load`. The message of the error is the reason alone."""
        with _bad_image(), self.open(index) as file:
            return decode_rgb(file)

    def open(self, index: int) -> BinaryIO:
        """As `Source.open`: a copy in memory, which lives until the image is decoded."""
        with _bad_image(), decode_errors():
            self.files[index].seek(0)
            return io.BytesIO(self.files[index].read())

    def pixels(self, index: int, file: BinaryIO | None) -> "Tensor":
        """As `Source.pixels`. The message of the error is the reason alone."""
        assert file is not None
        with file, _bad_image():
            return decode_pixels(file)

    def location(self, index: int) -> str:
        """As `Source.location`."""
        return f"upload {index}"

    def stamp(self, index: int) -> str:
        """As `Source.stamp`: the content itself."""
        with self.open(index) as file:
            return hashlib.blake2b(file.read(), digest_size=16).hexdigest()


@contextmanager
def _bad_image() -> Iterator[None]:
    try:
        yield
    except DecodeError as problem:
        raise BadImage(str(problem)) from problem
