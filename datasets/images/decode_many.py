"""Decodes many images in parallel threads, with a bounded number of images and results in memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from PIL import Image

from tailtune.datasets.images.decoding_room import DecodingRoom
from tailtune.datasets.images.image_files import DecodeError, load_rgb
from tailtune.datasets.images.ordered_map import ordered_map


class Decoded(NamedTuple):
    """What became of one image."""

    position: int
    """Position of the image in the sequence."""
    result: object
    """What the function returned; None if the image cannot be decoded."""
    problem: str
    """Why the image cannot be decoded; empty if it can."""


def decode_many(
    items: Sequence[Any],
    use: Callable[[Image.Image], object] | None = None,
    load: Callable[[Any], Image.Image] = load_rgb,
    description: str = "decoding images",
) -> Iterator[Decoded]:
    """Decode images, and call a function with each image.

    The images that are decoded at the same time have a bounded number of pixels together (`DecodingRoom`). So the
    memory that this takes does not grow with the number of threads.

    Args:
        items: N files, or what else `load` takes. FIFOs, devices, broken files and too many pixels are problems.
        use: gets each image in mode RGB, and must not keep it; None if only the problems are of interest.
        load: gives the image of an item in mode RGB, or raises DecodeError.
        description: text of the progress bar.

    Yields:
        What became of each item, in their order.
    """

    room = DecodingRoom()

    def decode(position: int) -> Decoded:
        with room.one_image():
            try:
                image = load(items[position])
            except DecodeError as error:
                return Decoded(position, None, str(error))
            return Decoded(position, use(image) if use else None, "")

    return ordered_map(decode, len(items), description)
