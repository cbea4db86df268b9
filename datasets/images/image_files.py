"""Image files: which formats are read, how a file becomes an RGB image, and a quick check of many files.

Images are converted by Pillow's `convert("RGB")`: transparency is dropped, and CMYK is converted without a colour
profile. There are three exceptions: grey of more than 8 bits (see `deep_grey.py`); mode La, which Pillow cannot convert
directly; and an EXIF orientation, by which the image is rotated. Of an animation the first frame is read.
"""

import io
import logging
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, cast

from PIL import Image, ImageOps, UnidentifiedImageError, features

from tailtune.datasets.images.bounded_reads import MAX_BYTES, MAX_PIXELS, BoundedReads, has_too_many_scans
from tailtune.datasets.images.decoding_room import LARGE_FILE, take_room_for_file, take_room_for_pixels
from tailtune.datasets.images.deep_grey import is_deep_grey, to_eight_bits
from tailtune.datasets.images.regular_files import EMPTY, NotARegularFile, open_regular

KNOWN_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
}
LIBRARY_OF_FORMAT = {"JPEG": "jpg", "PNG": "zlib", "WEBP": "webp", "AVIF": "avif"}
"""Format → the library that reads it, where Pillow may have been built without that library."""


def _is_available(library: str) -> bool:
    known = library in features.modules or library in features.codecs  # an old Pillow does not know avif
    return known and bool(features.check(library))


FORMATS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        name: extensions
        for name, extensions in KNOWN_FORMATS.items()
        if name not in LIBRARY_OF_FORMAT or _is_available(LIBRARY_OF_FORMAT[name])
    }
)
"""Pillow's name of a format → its file extensions. Pillow tries no other format: an EPS file that is called x.jpg does
not start Ghostscript."""
EXTENSIONS: tuple[str, ...] = tuple(extension for extensions in FORMATS.values() for extension in extensions)

WHOLE_FILE_FORMATS = ("WEBP", "AVIF")
"""Pillow reads these files whole and decodes them into extra copies, so they may have half of `MAX_PIXELS` and at most
`MAX_BYTES`."""
LONGEST = 500
"""The short side is resized to the side of the network's input, so a longer image would become too large."""
HEADER_BYTES = 16
"""The first bytes of a file, by which Pillow's `accept` functions recognise its format."""
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error)
"""What Pillow's decoders raise for damaged files (AVIF's decoder raises RuntimeError). Other exceptions are bugs."""


def silence_pillow() -> None:
    """Silence Pillow's warnings about single files, such as damaged EXIF data or many pixels.

    With thousands of files they would hide our own messages. A file that cannot be read still raises an error.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").addHandler(logging.NullHandler())


silence_pillow()


class DecodeError(Exception):
    """A file is missing or cannot be decoded as an image. The message is the reason, without the path."""


def load_rgb(path: Path) -> Image.Image:
    """Decode an image file. A FIFO or a device is refused, never waited for.

    Args:
        path: the file.

    Returns:
        The image in mode RGB, rotated as its EXIF data say.

    Raises:
        DecodeError: the file is missing, not a regular file, of a format that is not in `FORMATS`, damaged, incomplete,
            or has too many pixels.
    """
    with open_file(path) as file:
        return decode_rgb(file)


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Args:
        path: the file.

    Raises:
        DecodeError: nothing is there, or it is no regular file.
    """
    try:
        descriptor, _ = open_regular(path)
    except NotARegularFile as reason:
        raise DecodeError(str(reason)) from None
    return os.fdopen(descriptor, "rb")


def read_file(path: Path) -> BinaryIO:
    """Read a file into memory, unless it is a `LARGE_FILE`; then it is only opened, so that it takes no memory twice.

    Args:
        path: the file.

    Raises:
        DecodeError: as `open_file`, or the file cannot be read.
    """
    file = open_file(path)
    if os.fstat(file.fileno()).st_size > LARGE_FILE:
        return file
    with file, decode_errors():
        return io.BytesIO(file.read())


def decode_rgb(file: BinaryIO) -> Image.Image:
    """Decode an image as `load_rgb` does.

    Args:
        file: the encoded image, which can be read from any position.

    Raises:
        DecodeError: as `load_rgb`.
    """
    with open_image(file) as image, decode_errors():
        return upright_rgb(image)


def open_image(file: BinaryIO) -> Image.Image:
    """Read the header of an image. The pixels are read later, by Pillow or by another library.

    Args:
        file: the encoded image, which can be read from any position.

    Returns:
        Pillow's image, which has a format and a number of pixels that are allowed. Closing it leaves the file open.

    Raises:
        DecodeError: a format that is not in `FORMATS`, a damaged header, or too many pixels.
    """
    bounded = BoundedReads(file)
    try:
        with decode_errors():
            size = file.seek(0, os.SEEK_END)
            take_room_for_file(size)
            file.seek(0)
            header = file.read(HEADER_BYTES)
            if size > MAX_BYTES and format_of(header) in WHOLE_FILE_FORMATS:
                raise DecodeError(f"larger than {MAX_BYTES >> 20} MiB")
            image = Image.open(cast(BinaryIO, bounded), formats=tuple(FORMATS))
    except _Unidentified:
        raise DecodeError(unidentified(header)) from None
    limit = MAX_PIXELS // 2 if image.format in WHOLE_FILE_FORMATS else MAX_PIXELS
    if image.width * image.height > limit:
        raise DecodeError(f"{image.width} × {image.height}, {_too_large(limit)}")
    if max(image.size) > LONGEST * min(image.size):
        raise DecodeError(f"{image.width} × {image.height}, more than {LONGEST} times as long as wide: crop it")
    if image.format in ("JPEG", "MPO") and has_too_many_scans(file, size, image.width * image.height):
        raise DecodeError("a JPEG with more scans than an image can need")
    bounded.begin_pixels(image.width, image.height)
    take_room_for_pixels(image.width * image.height)
    return image


@contextmanager
def decode_errors() -> Iterator[None]:
    """Turn what Pillow raises for damaged files into a `DecodeError`."""
    try:
        yield
    except UnidentifiedImageError:
        raise _Unidentified from None
    except Image.DecompressionBombError:
        raise DecodeError(_too_large(MAX_PIXELS)) from None
    except DECODE_ERRORS as error:
        raise DecodeError(" ".join(str(error).split()) or type(error).__name__) from error


class _Unidentified(DecodeError):
    """Pillow does not know the format."""


def _too_large(limit: int) -> str:
    return f"more than {limit:,} pixels: make it smaller"


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB as `load_rgb` does.

    Args:
        image: an image of any mode. It may be rotated in place, as its EXIF data say.

    Returns:
        The image in mode RGB.
    """
    image.load()
    with suppress(*DECODE_ERRORS):  # damaged EXIF data; the pixels may be fine
        ImageOps.exif_transpose(image, in_place=True)
    if is_deep_grey(image.mode):
        image = to_eight_bits(image)
    elif image.mode == "La":
        image = image.convert("LA")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy it


def format_of(header: bytes) -> str | None:
    """The format of a file by Pillow's own rules.

    Args:
        header: its first `HEADER_BYTES` bytes, or all if it has fewer.

    Returns:
        A key of `FORMATS`, or None.
    """
    header = header.ljust(HEADER_BYTES, b"\0")
    return next((name for name, accept in accept_functions() if accept(header) is True), None)


@cache
def accept_functions() -> list[tuple[str, Callable[[bytes], bool | str]]]:
    """Format → Pillow's function that recognises its first bytes (it returns a string if a library is missing)."""
    Image.init()
    return [(name, accept) for name in FORMATS if (accept := Image.OPEN[name][1])]


def unidentified(header: bytes) -> str:
    """Why Pillow does not accept a file that begins with these bytes."""
    if not header:
        return EMPTY
    if name := format_of(header):
        return f"the header of this {name} file is damaged"
    return f"in none of the formats that are read ({', '.join(FORMATS)}): it begins with {header!r}"
