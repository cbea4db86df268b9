"""Decodes many image files in parallel threads, with a bounded number of images and results in memory."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from tailtune.datasets.images.image_files import DecodeError, load_rgb
from tailtune.datasets.images.ordered_map import ordered_map


class Decoded(NamedTuple):
    """What became of one file."""

    position: int
    """Position of the file in the sequence."""
    result: object
    """What the function returned; None if the file cannot be decoded."""
    problem: str
    """Why the file cannot be decoded; empty if it can."""


def decode_many(
    paths: Sequence[Path], use: Callable[[Image.Image], object] | None = None, description: str = "decoding images"
) -> Iterator[Decoded]:
    """Decode image files, and call a function with each image.

    Args:
        paths: N files. FIFOs, devices, broken files and files with too many pixels are problems.
        use: gets each image in mode RGB; None if only the problems are of interest.
        description: text of the progress bar.

    Yields:
        What became of each file, in the order of the files.
    """

    def decode(position: int) -> Decoded:
        try:
            image = load_rgb(paths[position])
        except DecodeError as error:
            return Decoded(position, None, str(error))
        return Decoded(position, use(image) if use else None, "")

    return ordered_map(decode, len(paths), description)
